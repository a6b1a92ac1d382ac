"""``shadow <- lerp(shadow, parameter, 1 - decay)``, for all profiles in one pass.

A plan is made once for a set of tensors and run at every update. ``impl`` chooses the code:
``"fused"`` (one pass over memory, in C on the CPU and in one Triton launch on a GPU; the default
where it is there, for the tensors that it takes),
``"foreach"`` (PyTorch's kernels, in batches) or ``"reference"`` (a plain loop, to compare with).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor

from sharded_ema.averaging.kernels import fused, launches
from sharded_ema.averaging.kernels.batches import (
    Batch,
    heal,
    is_finite,
    lerp_batch,
    lerp_batch_guarded,
    make_batches,
)
from sharded_ema.averaging.kernels.fused import FusedTable
from sharded_ema.averaging.kernels.launches import LaunchTable
from sharded_ema.averaging.kernels.reference import lerp_reference
from sharded_ema.averaging.kernels.watch import Watch
from sharded_ema.errors import ConfigError
from sharded_ema.model.precision import real_view

IMPLS = ("fused", "foreach", "reference")


class LerpPlan:
    """The update of one fixed set of tensors.

    Args:
        shadows: for each profile one tensor per parameter, shaped like ``live``.
        live: the parameters; the plan keeps these tensors (not copies) and reads them at each run.
            Complex ones are read as the real numbers that they are made of.
        guard: skip and count elements whose parameter is not finite.
        impl: one of :data:`IMPLS`; ``None`` for the first that is there.

    Attributes:
        given: the parameters.
        shadows, live: all tensors, of real numbers.

    Raises:
        ConfigError: there is no such implementation, or it was not built.
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
        self.given = list(live)
        self.shadows = [[real_view(tensor) for tensor in views] for views in shadows]
        self.live = [real_view(tensor) for tensor in live]
        self.guard = guard
        self._reference = impl == "reference"
        self._table: FusedTable | None = None
        self._launches: list[LaunchTable] = []
        self._batches: list[Batch] = []
        if not self._reference:
            self._divide(impl)
        direct = {id(t) for batch in self._batches if batch.stage is None for t in batch.live}
        copied = {id(t) for batch in self._batches if batch.stage is not None for t in batch.live}
        if self._reference:
            copied = set(map(id, self.live))
        self._watch = Watch(live, direct, copied)
        self._skipped: dict[torch.device, Tensor] = {}
        self._skipped_by_table = 0

    def _divide(self, impl: str | None) -> None:
        """Give every tensor to the table of its device, or to a batch."""
        if impl == "fused":
            _require_fused({tensor.device.type for tensor in self.live})
        rows = list(zip(self.live, *self.shadows, strict=True))
        tables = [impl != "foreach" and _table_of(t, views) for t, *views in rows]
        for found in {table: None for table in tables if table}:
            kind, device = found
            shadows, live = self._choose([table == found for table in tables])
            if kind == "extension":
                self._table = FusedTable(shadows, live)
                continue
            table = LaunchTable(shadows, live)
            problem = table.try_out(guard=self.guard)
            if problem is None:
                self._launches.append(table)
            elif impl == "fused":
                raise ConfigError(f"impl 'fused' was asked for and fails on {device}: {problem}")
            else:
                tables = [False if table == found else table for table in tables]
        self._batches = make_batches(*self._choose([not t for t in tables]), guard=self.guard)

    def _choose(self, which: Sequence[bool]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Some of the tensors: their shadows by profile, and the parameters."""
        return [list(compress(views, which)) for views in self.shadows], list(
            compress(self.live, which)
        )

    def reads(self, live: Sequence[Tensor]) -> bool:
        """Whether a run would read these tensors as they are now. Takes next to no time."""
        return self._watch.holds(live)

    @property
    def num_pieces(self) -> int:
        """Tensors that a run updates, those as one that lie in memory as if they were."""
        rows = 0 if self._table is None else self._table.num_rows
        rows += sum(len(table.live) for table in self._launches)
        return rows + sum(len(batch.live) for batch in self._batches)

    @torch.no_grad()
    def run(self, weights: Sequence[float]) -> None:
        """Update every shadow in place; ``weights[k]`` is ``1 - decay`` of profile ``k``.

        Only after :meth:`reads` has said yes: some tensors are read by the address that they had.
        No collective, no host synchronisation, no temporary beyond the stage buffer.
        """
        if self._reference:
            count = lerp_reference(self.shadows, self.live, weights, guard=self.guard)
            if self.guard:
                self._counter(count.device).add_(count)
        if self._table is not None:
            self._skipped_by_table += self._table.lerp(weights, guard=self.guard)
        for table in self._launches:
            table.lerp(weights, self._counter(table.device) if self.guard else None)
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
        total = self._skipped_by_table + sum(int(count) for count in self._skipped.values())
        self._skipped.clear()
        self._skipped_by_table = 0
        return total

    @torch.no_grad()
    def nonfinite(self) -> list[int]:
        """Positions in ``live`` of tensors that hold NaN or Inf. Waits for the device."""
        if not self._reference and self._is_finite():
            return []
        pairs = zip(self.live, self.shadows[0], strict=True)
        return [i for i, (t, shadow) in enumerate(pairs) if not _fits(t, shadow.dtype)]

    def _is_finite(self) -> bool:
        if self._table is not None and not (self.reads(self.given) and self._table.is_finite()):
            return False
        seen = [Batch(table.live, []) for table in self._launches]
        return all(map(is_finite, [*seen, *self._batches]))

    @torch.no_grad()
    def heal(self, positions: Iterable[int]) -> None:
        """Elements of these shadows that are NaN or Inf become the parameter's."""
        for i in positions:
            for views in self.shadows:
                heal(views[i], self.live[i])


def _table_of(live: Tensor, views: Sequence[Tensor]) -> tuple[str, torch.device] | None:
    """The table that a parameter and its shadows go into; ``None`` for none."""
    if launches.takes(live, views) and launches.triton_module() is not None:
        return "launch", live.device
    if fused.takes(live, views) and fused.extension() is not None:
        return "extension", live.device
    return None


def _require_fused(types: Collection[str]) -> None:
    """Refuse what was asked for by name and is not there."""
    if "cpu" in types and fused.extension() is None:
        raise ConfigError(
            "impl 'fused' was asked for and its C extension is not installed; install "
            "sharded-ema from source where there is a C compiler, or leave impl out"
        )
    if launches.DEVICES & set(types) and launches.triton_module() is None:
        raise ConfigError(
            "impl 'fused' was asked for and there is no Triton; install the one that fits this "
            "PyTorch, or leave impl out"
        )


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all elements are finite, also in a narrower dtype."""
    narrower = dtype.itemsize < tensor.dtype.itemsize
    return bool(torch.isfinite(tensor.to(dtype) if narrower else tensor).all())
