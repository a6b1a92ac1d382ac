"""The shadow of this rank's shards: one set of fp32 averages for each profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_ema.averaging.kernels import LerpPlan
from sharded_ema.errors import StateError


class Shadow:
    """Averages of a fixed list of local tensors, one set per profile.

    Each profile has one flat buffer per device, with a view per parameter that has the
    parameter's shape and, where that is gapless, its memory order.

    Args:
        profiles: names of the averages.
        live: this rank's part of every averaged tensor, in a fixed order.
        names: of these tensors, for messages.
        dtype: dtype of the shadow.
        device: where the shadow lies; ``None`` for each parameter's own device.
        guard: skip and count non-finite elements.
        impl: kernel implementation; ``None`` for the best.

    Attributes:
        views: for each profile one tensor per parameter.
        skipped_elements: those that the guard has skipped, as of the last look.
    """

    # What a copy does not share: it reads the tensors of a copied model, which track() tells.
    not_copied = ("_plan", "_pointers")

    def __init__(
        self,
        profiles: Iterable[str],
        live: Sequence[Tensor],
        names: Sequence[str],
        *,
        dtype: torch.dtype,
        device: torch.device | None,
        guard: bool,
        impl: str | None,
    ) -> None:
        self.skipped_elements = 0
        self._names = names
        self._guard = guard
        self._impl = impl
        self._seeded = False
        self._flats: list[Tensor] = []
        self.views = {name: self._allocate(live, dtype, device) for name in profiles}
        self._plan: LerpPlan | None = self._make_plan(live)
        self._pointers = [t.data_ptr() for t in live]

    def __getstate__(self) -> dict[str, Any]:
        self.collect_skipped()
        return {name: value for name, value in vars(self).items() if name not in self.not_copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _plan=None, _pointers=[])

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

    def track(self, live: Sequence[Tensor]) -> None:
        """Take up parameters that moved in memory (``model.to()``), else do nothing.

        Raises:
            StateError: a parameter changed its shape since the shadow was made.
        """
        pointers = list(map(Tensor.data_ptr, live))
        if pointers == self._pointers:
            return
        views = next(iter(self.views.values()))
        for tensor, view, name in zip(live, views, self._names, strict=True):
            if tensor.shape != view.shape:
                raise StateError(
                    f"parameter {name} had local shape {tuple(view.shape)} when the average was "
                    f"made and has {tuple(tensor.shape)} now; make a new ShardedEMA after "
                    "resizing a model"
                )
        self.collect_skipped()
        self._plan = self._make_plan(live)
        self._pointers = pointers

    @property
    def _tracked(self) -> LerpPlan:
        assert self._plan is not None, "a copy is tracked before it is used"
        return self._plan

    @torch.no_grad()
    def copy_live(
        self, *, keep_nonfinite: bool, profiles: Iterable[str] | None = None
    ) -> list[str]:
        """Shadows become the parameters; this may wait for the device.

        Args:
            keep_nonfinite: copy NaN and Inf too. Otherwise such elements keep what the shadow
                held, unless it never held anything.
            profiles: of which; ``None`` for all.

        Returns:
            Names of parameters in which NaN or Inf were found, if that was looked for.
        """
        plan = self._tracked
        live = plan.live
        bad = [] if keep_nonfinite else plan.nonfinite()
        for views in (self.views[name] for name in profiles or self.views):
            for i, (view, parameter) in enumerate(zip(views, live, strict=True)):
                if i in bad and self._seeded:
                    value = parameter.to(view.device, view.dtype)
                    view.copy_(torch.where(torch.isfinite(value), value, view))
                else:
                    view.copy_(parameter)
        self._seeded = True
        return [self._names[i] for i in bad]

    @torch.no_grad()
    def equals(self, live: Sequence[Tensor], positions: Sequence[int]) -> bool:
        """Whether some tensors are what a shadow holds; NaN and Inf count as equal to anything."""
        views = next(iter(self.views.values()))
        return all(_is_cast(views[i], live[i]) for i in positions)

    def lerp(self, decays: Mapping[str, float]) -> None:
        """Move every shadow: ``shadow <- decay * shadow + (1 - decay) * parameter``.

        Args:
            decays: by profile.
        """
        self._tracked.run([1.0 - decays[name] for name in self.views])

    def nonfinite(self) -> list[str]:
        """Names of parameters that hold NaN or Inf. Waits for the device."""
        return [self._names[i] for i in self._tracked.nonfinite()]

    def collect_skipped(self) -> int:
        """Elements that the guard has skipped so far. Waits for the device."""
        if self._plan is not None:
            self.skipped_elements += self._plan.take_skipped()
        return self.skipped_elements

    @property
    def allocated(self) -> dict[torch.device, int]:
        """Bytes allocated for the shadow, by device."""
        total: dict[torch.device, int] = {}
        for flat in self._flats:
            total[flat.device] = total.get(flat.device, 0) + flat.untyped_storage().nbytes()
        return total

    @property
    def num_bytes(self) -> int:
        """Bytes that its elements take."""
        return sum(v.numel() * v.element_size() for views in self.views.values() for v in views)


# Elements compared at a time.
_BLOCK = 1 << 22


def _is_cast(view: Tensor, live: Tensor) -> bool:
    if live.dtype == view.dtype and live.device == view.device and torch.equal(view, live):
        return True
    if not view.is_contiguous() or not live.is_contiguous():
        pairs = [(view, live)]
    else:
        pairs = list(
            zip(view.view(-1).split(_BLOCK), live.detach().view(-1).split(_BLOCK), strict=True)
        )
    for ours, theirs in pairs:
        value = theirs.to(ours.device, ours.dtype)
        if not bool(((ours == value) | ~torch.isfinite(value)).all()):
            return False
    return True
