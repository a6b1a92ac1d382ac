"""An average: profiles, schedules, shadow and clock. It alone decides when and how far it moves.

It knows no optimizer and no framework: it is told that a step was applied, and given this rank's
parameters as they are then. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharded_ema.averaging.ahead import StepsAhead
from sharded_ema.averaging.clock import Clock
from sharded_ema.averaging.forgetting import per_step, share_left
from sharded_ema.averaging.kernels import launches
from sharded_ema.averaging.schedules import Schedule, horizon
from sharded_ema.averaging.shadow import Shadow
from sharded_ema.config import OFFLOAD_BUFFER
from sharded_ema.errors import ConfigError, NonFiniteError, StateError

# The step whose decay stands for those of a long run, if nobody says how long it will be.
_MANY_STEPS = 1_000_000


class Average:
    """Exponential moving averages of a fixed list of tensors, by profile.

    Args:
        profiles: schedules by name.
        live: this rank's part of every averaged tensor, in a fixed order.
        names: of these tensors.
        update_every: applied steps between two updates.
        start_step: applied step at which averaging starts.
        decay_per: see :class:`Clock`.
        nonfinite: ``"skip"`` elements that are NaN or Inf, ``"raise"`` before anything is touched,
            or ``"allow"``.
        dtype: of the shadow; ``None`` for at least fp32 and the precision of each parameter.
        device: where the shadow lies; ``None`` for each parameter's own device.
        impl: kernel implementation; ``None`` for the best.
        offload_buffer: bytes of a GPU that its parameters pass through to a shadow on the host.
        capturable: let the device count, so that an update may be recorded in a graph.

    Attributes:
        profiles: as given.
        shadow: its values.
        broken: why it cannot be used, ``None`` if it can.
    """

    def __init__(
        self,
        profiles: Mapping[str, Schedule],
        live: Sequence[Tensor],
        names: Sequence[str],
        *,
        update_every: int = 1,
        start_step: int = 0,
        decay_per: str = "step",
        nonfinite: str = "skip",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        impl: str | None = None,
        offload_buffer: int = OFFLOAD_BUFFER,
        capturable: bool = False,
    ) -> None:
        self.profiles = dict(profiles)
        self._clock = Clock(update_every, start_step, decay_per)
        self._ahead: StepsAhead | None = None
        if capturable:
            self._ahead = StepsAhead(self.profiles, self._clock, launched_on(live, names))
        self.shadow = Shadow(
            self.profiles,
            live,
            names,
            dtype=dtype,
            device=device,
            guard=nonfinite == "skip",
            impl=impl,
            offload_buffer=offload_buffer,
            by_step=None if self._ahead is None else self._ahead.weights,
        )
        self._seed_weights = dict.fromkeys(self.profiles, 1.0)
        self.broken: str | None = None
        self._nonfinite = nonfinite
        self._fresh = False
        self._moves = 0

    # ------------------------------------------------------------------ counting

    @property
    def clock(self) -> Clock:
        """Its counters; where the device counts, as it has them by now, for which this waits."""
        self._catch_up()
        return self._clock

    @property
    def seed_weights(self) -> dict[str, float]:
        """For each profile the share that is still the weights it was seeded with."""
        self._catch_up()
        return self._seed_weights

    def _catch_up(self) -> None:
        if self._ahead is not None and not self._ahead.is_recorded:
            self._ahead.catch_up(self._clock, self._seed_weights)

    def _recount(self) -> None:
        """The counters have become others than those of the next step."""
        if self._ahead is not None:
            self._ahead.go_on_from(self._clock)

    # ------------------------------------------------------------------ moving

    def advance(self, live: Sequence[Tensor], *, overlap: bool = False) -> list[str] | None:
        """One more optimizer step was applied.

        Args:
            overlap: parameters of a GPU may be read until the next :meth:`release`.

        Returns:
            If the shadow became the parameters at this step, the names of those that hold NaN or
            Inf; else ``None``.

        Raises:
            NonFiniteError: with ``nonfinite="raise"``; the step is counted, as on the ranks whose
                parameters are finite, and its values are not taken in.
            StateError: the update before has failed behind its call.
        """
        if self._ahead is not None:
            self._advance_on_device(self._ahead, live)
            return None
        clock = replace(self._clock, applied_steps=self._clock.applied_steps + 1)
        if clock.starts or clock.is_due:
            self.settle()
        self.require_whole()
        self.shadow.follow(live)
        bad = self.shadow.nonfinite() if self._nonfinite == "raise" else []
        decays = clock.decays_due(self.profiles)
        started = None
        with self._whole("an update"):
            self._clock = clock
            self._fresh = False
            self._moves += clock.starts or bool(decays)
            if clock.starts:
                clock.seeded()
                started = self.copy_live()
            elif decays:
                if not bad:
                    self.shadow.lerp(decays, overlap=overlap)
                for name, decay in decays.items():
                    self._seed_weights[name] *= decay
                clock.taken_in()
        if bad:
            raise NonFiniteError(
                f"{len(bad)} parameters hold NaN or Inf on this rank after step "
                f"{clock.applied_steps}, among them {bad[:3]}; the step is counted, as on all "
                "ranks, and the average has kept its values"
            )
        return started

    def _advance_on_device(self, ahead: StepsAhead, live: Sequence[Tensor]) -> None:
        """As :meth:`advance`, by counters of the device: each replay of what is recorded counts."""
        self.require_whole()
        if ahead.is_recorded and not self.shadow.reads(live):
            raise StateError(
                "parameters have other memory than at the last update, which cannot be noted while "
                "a graph is recorded; take a step with its update before, as a warm-up"
            )
        self.shadow.follow(live)
        with self._whole("an update"):
            self._fresh = False
            self._moves += 1
            ahead.count()
            self.shadow.lerp_by_step(keep=ahead.is_recorded)

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """Mark the average as broken unless the block ends well."""
        self.broken = (
            f"{what} was interrupted midway, so that some of its tensors have moved and others "
            "have not; load a checkpoint, or start it anew from the weights with ema.reseed()"
        )
        yield
        self.broken = None

    def release(self) -> None:
        """From now on parameters may change, whatever an update has still to read of them."""
        self.shadow.release()

    def track(self, live: Sequence[Tensor]) -> None:
        """Take up parameters whose memory has changed.

        Raises:
            StateError: one has another shape now.
        """
        self.shadow.track(live)

    def copy_live(self, profiles: Iterable[str] | None = None) -> list[str]:
        """The shadows, or those of some profiles, become the parameters; the clock stays.

        Returns:
            Names of parameters that hold NaN or Inf, which are left out unless they are allowed.
        """
        chosen = list(self.profiles if profiles is None else profiles)
        bad = self.shadow.copy_live(keep_nonfinite=self._nonfinite == "allow", profiles=chosen)
        self._seed_weights |= dict.fromkeys(chosen, 1.0)
        return bad

    def start(self) -> list[str]:
        """Begin, or begin anew: the shadow becomes the parameters, ``n`` is 0.

        Before ``start_step`` the clock has not begun and does not now.

        Returns:
            As :meth:`copy_live`.
        """
        with self._whole("its start"):
            self._moves += 1
            clock = self.clock
            if clock.seed_step is not None or clock.start_step == 0:
                clock.seeded()
            self._recount()
            self._fresh = clock.seed_step is not None
            return self.copy_live()

    @property
    def moment(self) -> Hashable:
        """Another one whenever the average has become another, but by a replay. Never waits."""
        clock = self._clock
        return self._moves, clock.applied_steps if clock.seed_step is None else None

    @property
    def is_fresh(self) -> bool:
        """Whether it is still the weights that it was seeded with, and no step was counted.

        Where the device counts, this waits for it.
        """
        return self._fresh and self.num_updates == 0

    @property
    def has_started(self) -> bool:
        """Whether averaging has begun. Where the device counts, this waits for it until it has."""
        return self._clock.seed_step is not None or self.clock.seed_step is not None

    def is_seed(self, live: Sequence[Tensor], positions: Sequence[int]) -> bool:
        """Whether these tensors are still what a fresh average was seeded with. Waits for them."""
        return self.shadow.equals(live, positions)

    def examine(self) -> list[str]:
        """Names of parameters whose loaded average holds NaN or Inf, unless that is allowed.

        Such elements become the parameter's at the first update that finds it finite.
        """
        return [] if self._nonfinite == "allow" else self.shadow.examine()

    def mirror(self) -> None:
        """Before ``start_step`` the average is the parameters, NaN included."""
        if not self.has_started:
            self.shadow.copy_live(keep_nonfinite=True)

    # ------------------------------------------------------------------ looking

    def settle(self) -> None:
        """Wait for an update that goes on behind its call; the average is broken if it fails."""
        self.shadow.settle()
        failure, self.shadow.failure = self.shadow.failure, None
        if failure is not None:
            self.broken = (
                f"the update after step {self.clock.last_lerp_step} has failed behind its call "
                f"({type(failure).__name__}: {failure}), so that some of its tensors have moved "
                "and others have not; load a checkpoint, or start it anew from the weights with "
                "ema.reseed()"
            )

    def require_whole(self) -> None:
        """Refuse an average that was left half-written.

        Raises:
            StateError: see above.
        """
        if self.broken is not None:
            raise StateError(f"this average cannot be used: {self.broken}")

    def choose(self, profile: str | None) -> str:
        """The profile that is meant; may be left out if there is only one.

        Raises:
            ConfigError: there is none of that name.
        """
        known = list(self.profiles)
        if profile is None and len(known) == 1:
            return known[0]
        if profile not in known:
            raise ConfigError(f"profile {profile!r} is not one of {known}")
        return profile

    @property
    def num_updates(self) -> int:
        """Applied optimizer steps since the seed."""
        return self.clock.num_updates

    @property
    def decays(self) -> dict[str, float]:
        """Decay in force, by profile: per optimizer step, or per update."""
        n = max(1, self.num_updates)
        return {name: schedule.decay(n) for name, schedule in self.profiles.items()}

    @property
    def per_step(self) -> dict[str, Schedule]:
        """The schedules by which steps are forgotten, by profile."""
        clock = self.clock
        return {
            name: per_step(schedule, clock.decay_per, clock.update_every)
            for name, schedule in self.profiles.items()
        }

    @property
    def numbers(self) -> dict[str, float]:
        """What is worth a log of each profile: decay, horizon, share of the seed."""
        found: dict[str, float] = {}
        for name, decay in self.decays.items():
            found[f"decay/{name}"] = decay
            found[f"horizon_steps/{name}"] = self.clock.steps_per_decay * horizon(decay)
            found[f"seed_weight/{name}"] = self.seed_weights[name]
        return found

    # ------------------------------------------------------------------ its description

    def settings(self) -> dict[str, Any]:
        """How it averages, which must be the same on all ranks."""
        return {
            "update_every": self.clock.update_every,
            "decay_per": self.clock.decay_per,
            "start_step": self.clock.start_step,
            "schedule": {name: schedule.to_dict() for name, schedule in self.profiles.items()},
        }

    def counted(self) -> dict[str, Any]:
        """How it averages and what it has counted, which must be the same on all ranks."""
        return {
            **self.settings(),
            "the number of applied steps": self.clock.applied_steps,
            "the step it started from": self.clock.seed_step,
            "the step of the last update": self.clock.last_lerp_step,
        }

    def describe(self) -> dict[str, Any]:
        """Counters and profiles as a checkpoint stores them; JSON types only."""
        return {
            "num_updates": self.num_updates,
            **self.clock.to_dict(),
            "profiles": {
                name: {
                    "schedule": self.profiles[name].to_dict(),
                    "decay": decay,
                    "seed_weight": self.seed_weights[name],
                }
                for name, decay in self.decays.items()
            },
        }

    def described_after(self, num_updates: int) -> dict[str, Any]:
        """What :meth:`describe` says of an average of these schedules after so many updates."""
        start = self.clock.start_step
        steps = start + num_updates
        return {
            "step": num_updates,
            "num_updates": num_updates,
            "applied_steps": steps,
            "seed_step": start,
            "last_lerp_step": steps,
            "profiles": {
                name: {"seed_weight": share_left(schedule, num_updates)}
                for name, schedule in self.per_step.items()
            },
        }

    def go_on_from(self, described: Mapping[str, Any]) -> list[str]:
        """Take over the counters that belong to values just loaded.

        Returns:
            Profiles that were not there, which begin with the parameters as they are now.
        """
        self._clock.go_on_from(described)
        self._fresh = False
        self._moves += 1
        stored = described["profiles"]
        for name in self.profiles.keys() & stored.keys():
            self._seed_weights[name] = stored[name]["seed_weight"]
        self._recount()
        self.broken = None
        fresh = sorted(self.profiles.keys() - stored.keys())
        if fresh:
            self.copy_live(fresh)
        return fresh


def launched_on(live: Sequence[Tensor], names: Sequence[str]) -> torch.device:
    """The one device whose kernel takes all parameters.

    Raises:
        ConfigError: there are others.
    """
    for tensor, name in zip(live, names, strict=True):
        if tensor.device.type not in launches.DEVICES or tensor.device != live[0].device:
            raise ConfigError(
                f"capturable=True takes parameters of one CUDA device, and {name} is on "
                f"{tensor.device}; move the model there before, or leave capturable out"
            )
    return live[0].device


def check_dtype(
    dtype: torch.dtype | None, profiles: Mapping[str, Schedule], total_steps: int | None
) -> None:
    """Refuse a dtype in which an average would not move.

    An update by less than half a unit in the last place is rounded away. That is what becomes of
    all of them once ``1 - decay`` is below the precision of the dtype, unless the parameter is far
    from its average.

    Args:
        dtype: ``None`` for at least fp32, with which there is nothing to check.
        total_steps: planned optimizer steps; ``None`` if unknown.

    Raises:
        ConfigError: see above, or the dtype is no floating one.
    """
    if dtype is None:
        return
    if not dtype.is_floating_point:
        raise ConfigError(f"shadow_dtype must be a floating dtype, got {dtype}")
    if dtype.itemsize >= 4:
        return
    for name, schedule in profiles.items():
        weight = 1.0 - schedule.decay(total_steps or _MANY_STEPS)
        if weight < torch.finfo(dtype).eps:
            raise ConfigError(
                f"a {dtype} shadow of the average {name!r} does not move: at a decay of "
                f"{1.0 - weight:.6g} an update is smaller than its rounding error. Keep float32, "
                f"or choose a decay below {1.0 - torch.finfo(dtype).eps:.4g}"
            )
