"""``shadow <- lerp(shadow, parameter, 1 - decay)``, for all profiles in one pass.

A plan is made once for a set of tensors and run at every update. ``impl`` chooses the code:
``"foreach"`` (the default) or ``"reference"`` (a plain loop, to compare with).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_ema.averaging.kernels.batches import (
    Batch,
    is_finite,
    lerp_batch,
    lerp_batch_guarded,
    make_batches,
)
from sharded_ema.averaging.kernels.reference import lerp_reference
from sharded_ema.errors import ConfigError

IMPLS = ("foreach", "reference")


class LerpPlan:
    """The update of one fixed set of tensors.

    Args:
        shadows: for each profile one tensor per parameter, shaped like ``live``.
        live: the parameters; the plan keeps these tensors (not copies) and reads them at each run.
        guard: skip and count elements whose parameter is not finite.
        impl: one of :data:`IMPLS`; ``None`` for the first.

    Raises:
        ConfigError: there is no such implementation.
    """

    def __init__(
        self,
        shadows: Sequence[Sequence[Tensor]],
        live: Sequence[Tensor],
        *,
        guard: bool,
        impl: str | None = None,
    ) -> None:
        if impl is not None and impl not in IMPLS:
            raise ConfigError(f"impl {impl!r} is unknown; registered: {', '.join(IMPLS)}")
        self.shadows = shadows
        self.live = live
        self.guard = guard
        self._reference = impl == "reference"
        self._batches: list[Batch] = []
        if not self._reference:
            self._batches = make_batches(shadows, live, guard=guard)
        self._skipped: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def run(self, weights: Sequence[float]) -> None:
        """Update every shadow in place; ``weights[k]`` is ``1 - decay`` of profile ``k``.

        No collective, no host synchronisation, no temporary beyond the stage buffer.
        """
        if self._reference:
            count = lerp_reference(self.shadows, self.live, weights, guard=self.guard)
            if self.guard:
                self._counter(count.device).add_(count)
        for batch in self._batches:
            if self.guard:
                device = batch.shadows[0][0].device
                lerp_batch_guarded(batch, weights, self._counter(device))
            else:
                lerp_batch(batch, weights)

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            with torch.inference_mode(False):
                self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    def take_skipped(self) -> int:
        """Elements skipped since the last call. Waits for the device."""
        total = sum(int(count) for count in self._skipped.values())
        self._skipped.clear()
        return total

    @torch.no_grad()
    def nonfinite(self) -> list[int]:
        """Positions in ``live`` of tensors that hold NaN or Inf. Waits for the device."""
        if self._batches and all(is_finite(batch) for batch in self._batches):
            return []
        return [i for i, t in enumerate(self.live) if not bool(torch.isfinite(t).all())]
