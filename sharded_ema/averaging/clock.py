"""Counts of applied optimizer steps: when an average moves, and over which steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharded_ema.averaging.schedules import Schedule
from sharded_ema.errors import ConfigError


@dataclass(slots=True)
class Clock:
    """Counts applied optimizer steps in Python integers.

    Attributes:
        update_every: optimizer steps between two updates of the shadow.
        start_step: applied step at which the shadow is seeded with the parameters.
        decay_per: ``"step"`` if an update multiplies the decays of its steps, ``"update"`` if it
            has the decay of its last one.
        applied_steps: optimizer steps applied so far.
        seed_step: applied step of the last seed, or ``None`` before ``start_step``.
        last_lerp_step: applied step up to which the shadow has taken the parameters in.
    """

    update_every: int = 1
    start_step: int = 0
    decay_per: str = "step"
    applied_steps: int = 0
    seed_step: int | None = None
    last_lerp_step: int = 0

    @property
    def starts(self) -> bool:
        """Whether the shadow should become the parameters now, for the first time."""
        return self.seed_step is None and self.applied_steps >= self.start_step

    @property
    def is_due(self) -> bool:
        """Whether the shadow should take the parameters in now."""
        return self.seed_step is not None and self.open_steps >= self.update_every

    @property
    def open_steps(self) -> int:
        """Applied steps that the shadow has not taken in yet."""
        return self.applied_steps - self.last_lerp_step

    @property
    def num_updates(self) -> int:
        """Applied steps since the seed: the ``n`` of ``schedule.decay(n)``."""
        return 0 if self.seed_step is None else self.applied_steps - self.seed_step

    @property
    def steps_per_decay(self) -> int:
        """Applied steps for which one decay stands."""
        return self.update_every if self.decay_per == "update" else 1

    def seeded(self) -> None:
        """The shadow has just become the parameters."""
        self.seed_step = self.last_lerp_step = self.applied_steps

    def taken_in(self) -> None:
        """The shadow has just taken in all steps so far."""
        self.last_lerp_step = self.applied_steps

    def window_decay(self, schedule: Schedule) -> float:
        """Decay of an update now: of all steps since the last lerp, or of this one (float64).

        Raises:
            ConfigError: a schedule of the user's own left ``[0, 1]``.
        """
        seed = self.seed_step or 0
        first = self.last_lerp_step - seed + 1
        if self.decay_per == "update":
            first = self.num_updates
        decays = [schedule.decay(n) for n in range(first, self.num_updates + 1)]
        for n, decay in enumerate(decays, first):
            if not 0.0 <= decay <= 1.0:
                raise ConfigError(f"{schedule} gives the decay {decay} at n = {n}, not in [0, 1]")
        return math.prod(decays)

    def decays_due(self, profiles: Mapping[str, Schedule]) -> dict[str, float]:
        """Decay of the update that is due now, by profile; empty if none is."""
        if not self.is_due:
            return {}
        return {name: self.window_decay(schedule) for name, schedule in profiles.items()}

    def to_dict(self) -> dict[str, int | str | None]:
        """All counters, as stored in a checkpoint."""
        return {
            "update_every": self.update_every,
            "start_step": self.start_step,
            "decay_per": self.decay_per,
            "applied_steps": self.applied_steps,
            "seed_step": self.seed_step,
            "last_lerp_step": self.last_lerp_step,
        }

    def go_on_from(self, counters: Mapping[str, Any]) -> None:
        """Take over the counters of a checkpoint; the settings stay this clock's own.

        A start that still lies ahead is waited for, even if the checkpoint's average had begun.
        """
        self.applied_steps = counters["applied_steps"]
        self.seed_step = counters["seed_step"]
        self.last_lerp_step = counters["last_lerp_step"]
        if self.start_step > self.applied_steps:
            self.seed_step = None
