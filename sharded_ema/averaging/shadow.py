"""The shadow of this rank's shards, and the clock that says when it moves. No collectives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from sharded_ema.averaging.kernels import LerpPlan
from sharded_ema.averaging.schedules import Schedule
from sharded_ema.errors import ConfigError, StateError


class Action(Enum):
    """What an applied optimizer step asks of the shadow."""

    NONE = auto()
    SEED = auto()
    LERP = auto()


@dataclass(slots=True)
class Clock:
    """Counts applied optimizer steps in Python integers.

    Attributes:
        update_every: optimizer steps between two updates of the shadow.
        start_step: applied step at which the shadow is seeded with the parameters.
        applied_steps: optimizer steps applied so far.
        seed_step: applied step of the last seed, or ``None`` before ``start_step``.
        last_lerp_step: applied step up to which the shadow has taken the parameters in.
    """

    update_every: int = 1
    start_step: int = 0
    applied_steps: int = 0
    seed_step: int | None = None
    last_lerp_step: int = 0

    def reseed(self) -> None:
        """The shadow has just become the parameters."""
        self.seed_step = self.last_lerp_step = self.applied_steps

    def tick(self) -> Action:
        """One more optimizer step was applied."""
        self.applied_steps += 1
        if self.seed_step is None:
            if self.applied_steps < self.start_step:
                return Action.NONE
            self.reseed()
            return Action.SEED
        due = self.applied_steps - self.last_lerp_step >= self.update_every
        return Action.LERP if due else Action.NONE

    @property
    def num_updates(self) -> int:
        """Applied steps since the seed: the ``n`` of ``schedule.decay(n)``."""
        return 0 if self.seed_step is None else self.applied_steps - self.seed_step

    def window_decay(self, schedule: Schedule) -> float:
        """Product of the decays of all steps since the last lerp (float64).

        Raises:
            ConfigError: a schedule of the user's own left ``[0, 1]``.
        """
        seed = self.seed_step or 0
        first = self.last_lerp_step - seed + 1
        decays = [schedule.decay(n) for n in range(first, self.num_updates + 1)]
        for n, decay in enumerate(decays, first):
            if not 0.0 <= decay <= 1.0:
                raise ConfigError(f"{schedule} gives the decay {decay} at n = {n}, not in [0, 1]")
        return math.prod(decays)

    def to_dict(self) -> dict[str, int | None]:
        """All counters, as stored in a checkpoint."""
        return {
            "update_every": self.update_every,
            "start_step": self.start_step,
            "applied_steps": self.applied_steps,
            "seed_step": self.seed_step,
            "last_lerp_step": self.last_lerp_step,
        }


class Shadow:
    """fp32 averages of a fixed list of local tensors, one set per profile.

    Each profile has one flat buffer per device, with a view per parameter that has the
    parameter's shape and, where that is gapless, its memory order.

    Args:
        profiles: schedules by profile name.
        live: this rank's part of every averaged tensor, in a fixed order.
        dtype: dtype of the shadow.
        device: where the shadow lies; ``None`` for each parameter's own device.
        guard: skip and count non-finite elements.
        impl: kernel implementation.
    """

    def __init__(
        self,
        profiles: Mapping[str, Schedule],
        live: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device | None,
        guard: bool,
        impl: str,
    ) -> None:
        self.profiles = dict(profiles)
        self.seed_weight = dict.fromkeys(self.profiles, 1.0)
        self.skipped_elements = 0
        self._guard = guard
        self._impl = impl
        self._seeded = False
        self._flats: list[Tensor] = []
        self.views = {name: self._allocate(live, dtype, device) for name in self.profiles}
        self._plan = self._make_plan(live)
        self._pointers = [t.data_ptr() for t in live]

    # An evaluation may have turned inference mode on; its tensors could never be updated.
    @torch.inference_mode(False)
    def _allocate(
        self, live: Sequence[Tensor], dtype: torch.dtype, device: torch.device | None
    ) -> list[Tensor]:
        sizes: dict[torch.device, int] = {}
        for tensor in live:
            where = device or tensor.device
            sizes[where] = sizes.get(where, 0) + tensor.numel()
        free = {where: torch.empty(n, dtype=dtype, device=where) for where, n in sizes.items()}
        self._flats += free.values()
        views = []
        for tensor in live:
            where = device or tensor.device
            flat, free[where] = free[where].tensor_split([tensor.numel()])
            # empty_like settles the memory order: the parameter's if gapless, else C order.
            strides = torch.empty_like(tensor, device="meta").stride()
            views.append(
                flat.as_strided(tensor.shape, strides)
                if tensor.numel()
                else flat.view(tensor.shape)
            )
        return views

    @torch.inference_mode(False)
    def _make_plan(self, live: Sequence[Tensor]) -> LerpPlan:
        shadows = list(self.views.values())
        return LerpPlan(shadows, list(live), guard=self._guard, impl=self._impl)

    def follow(self, live: Sequence[Tensor], names: Sequence[str]) -> None:
        """Take up parameters that moved in memory (``model.to()``), else do nothing.

        Raises:
            StateError: a parameter changed its shape since the shadow was made.
        """
        pointers = list(map(Tensor.data_ptr, live))
        if pointers == self._pointers:
            return
        for tensor, view, name in zip(live, next(iter(self.views.values())), names, strict=True):
            if tensor.shape != view.shape:
                raise StateError(
                    f"parameter {name} had local shape {tuple(view.shape)} when the average was "
                    f"made and has {tuple(tensor.shape)} now; make a new ShardedEMA after "
                    "resizing a model"
                )
        self.collect_skipped()
        self._plan = self._make_plan(live)
        self._pointers = pointers

    @torch.no_grad()
    def seed(self, *, keep_nonfinite: bool, profiles: Iterable[str] | None = None) -> list[int]:
        """Shadows become the parameters; this happens once, and may wait for the device.

        Args:
            keep_nonfinite: copy NaN and Inf too. Otherwise such elements keep what the shadow
                held, unless it never held anything.
            profiles: of which; ``None`` for all.

        Returns:
            Positions of parameters in which NaN or Inf were found, if that was looked for.
        """
        live = self._plan.live
        bad = [] if keep_nonfinite else self._plan.nonfinite()
        chosen = list(self.profiles if profiles is None else profiles)
        for views in (self.views[name] for name in chosen):
            for i, (view, parameter) in enumerate(zip(views, live, strict=True)):
                if i in bad and self._seeded:
                    value = parameter.to(view.device, view.dtype)
                    view.copy_(torch.where(torch.isfinite(value), value, view))
                else:
                    view.copy_(parameter)
        self._seeded = True
        self.seed_weight |= dict.fromkeys(chosen, 1.0)
        return bad

    def lerp(self, clock: Clock) -> dict[str, float]:
        """Move every shadow by the window that ``clock`` says is open; returns the decays."""
        decays = {name: clock.window_decay(s) for name, s in self.profiles.items()}
        self._plan.run([1.0 - decay for decay in decays.values()])
        for name, decay in decays.items():
            self.seed_weight[name] *= decay
        clock.last_lerp_step = clock.applied_steps
        return decays

    def nonfinite(self) -> list[int]:
        """Positions of parameters that hold NaN or Inf. Waits for the device."""
        return self._plan.nonfinite()

    def collect_skipped(self) -> int:
        """Elements that the guard has skipped so far. Waits for the device."""
        self.skipped_elements += self._plan.take_skipped()
        return self.skipped_elements

    @property
    def num_bytes(self) -> dict[torch.device, int]:
        """Bytes allocated for the shadow, by device."""
        total: dict[torch.device, int] = {}
        for flat in self._flats:
            total[flat.device] = total.get(flat.device, 0) + flat.untyped_storage().nbytes()
        return total


def check_shadow_dtype(dtype: torch.dtype, *, force: bool) -> None:
    """Refuse a dtype in which an average would not move.

    Args:
        force: accept one below fp32.

    Raises:
        ConfigError: see above.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"shadow_dtype must be a floating dtype, got {dtype}")
    if dtype.itemsize < 4 and not force:
        raise ConfigError(
            f"a {dtype} shadow does not move: at decay 0.999 an update is smaller than its "
            "rounding error. Keep float32, or pass force_dtype=True"
        )
