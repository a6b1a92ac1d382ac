"""``shadow <- lerp(shadow, parameter, 1 - decay)``, for all profiles in one pass.

A plan is made once for a set of tensors and run at every update. ``impl`` chooses the code:
``"fused"`` (one pass over memory, in C on the CPU and in one Triton launch on a GPU; the default
where it is there, for the tensors that it takes),
``"foreach"`` (PyTorch's kernels, in batches) or ``"reference"`` (a plain loop, to compare with).
Parameters on a GPU whose shadow lies on the host come over first (``offload.py``); an update may
then go on behind the call, as it may beside the training on a GPU: :meth:`LerpPlan.release` and
:meth:`LerpPlan.settle` say when it has read and when it has written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain, compress

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
from sharded_ema.averaging.kernels.launches import LaunchTable, StepWeights
from sharded_ema.averaging.kernels.offload import Offload, comes_over
from sharded_ema.averaging.kernels.reference import lerp_reference
from sharded_ema.averaging.kernels.watch import Watch
from sharded_ema.config import OFFLOAD_BUFFER
from sharded_ema.errors import ConfigError
from sharded_ema.model.devices import SideStream
from sharded_ema.model.memory import one_of_each_storage
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
        buffer_bytes: of a device, that parameters pass through to a shadow on the host.
        by_step: weights on the device that :meth:`run_by_step` takes.

    Attributes:
        given: the parameters.
        shadows, live: all tensors, of real numbers.
        not_launched: positions of those with elements that no launch updates.

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
        buffer_bytes: int = OFFLOAD_BUFFER,
        by_step: StepWeights | None = None,
    ) -> None:
        if impl is not None and impl not in IMPLS:
            raise ConfigError(f"impl {impl!r} is unknown; registered: {', '.join(IMPLS)}")
        self.given = list(live)
        self.shadows = [[real_view(tensor) for tensor in views] for views in shadows]
        self.live = [real_view(tensor) for tensor in live]
        self.guard = guard
        self._by_step = by_step
        self._reference = impl == "reference"
        self._table: FusedTable | None = None
        self._launches: list[LaunchTable] = []
        self._batches: list[Batch] = []
        self._offloads: list[Offload] = []
        self._beside: dict[torch.device, SideStream] = {}  # where launches go that overlap
        self._sides: list[SideStream] = []  # all that may read or write behind the call
        if not self._reference:
            self._divide(impl, buffer_bytes)
        launched = {id(t) for table in self._launches for t in table.live}
        self.not_launched = [
            i for i, t in enumerate(self.live) if t.numel() and id(t) not in launched
        ]
        direct = {id(t) for batch in self._batches if batch.stage is None for t in batch.live}
        copied = {id(t) for batch in self._batches if batch.stage is not None for t in batch.live}
        if self._reference:
            copied = set(map(id, self.live))
        self._watch = Watch(live, direct, copied)
        self._homes = one_of_each_storage(chain.from_iterable(self.shadows))
        self._addresses = list(map(Tensor.data_ptr, self._homes))
        self._skipped: dict[tuple[torch.device, bool], Tensor] = {}
        self._skipped_by_table = 0
        if by_step is not None and guard:  # before a graph is recorded, which would own it
            for table in self._launches:
                self._counter(table.device)

    def _divide(self, impl: str | None, buffer_bytes: int) -> None:
        """Give every tensor to the table of its device, to a batch, or have it come over first."""
        if impl == "fused":
            _require_fused({tensor.device.type for tensor in self.shadows[0]})
        rows = list(zip(self.live, *self.shadows, strict=True))
        offloaded = [comes_over(t, views) for t, *views in rows]

        def make_update(views: Sequence[Sequence[Tensor]], landed: Sequence[Tensor]) -> LerpPlan:
            return LerpPlan(views, landed, guard=self.guard, impl=impl)

        for device in {t.device: None for t in compress(self.live, offloaded)}:
            pairs = zip(self.live, offloaded, strict=True)
            shadows, live = self._choose([over and t.device == device for t, over in pairs])
            self._offloads.append(
                Offload(shadows, live, make_update=make_update, buffer_bytes=buffer_bytes)
            )
            self._sides.append(self._offloads[-1].side)
        tables = [
            not over and impl != "foreach" and _table_of(t, views)
            for over, (t, *views) in zip(offloaded, rows, strict=True)
        ]
        for found in {table: None for table in tables if table}:
            kind, device, _ = found
            shadows, live = self._choose([table == found for table in tables])
            if kind == "extension":
                self._table = FusedTable(shadows, live)
                continue
            table = LaunchTable(shadows, live)
            problem = table.try_out(self._by_step, guard=self.guard)
            if problem is None:
                self._launches.append(table)
            elif impl == "fused" or self._by_step is not None:
                asked = "impl 'fused'" if self._by_step is None else "capturable=True"
                raise ConfigError(f"{asked} was asked for and fails on {device}: {problem}")
            else:
                tables = [False if table == found else table for table in tables]
        left = [not (t or over) for t, over in zip(tables, offloaded, strict=True)]
        self._batches = make_batches(*self._choose(left), guard=self.guard)

    def _choose(self, which: Sequence[bool]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Some of the tensors: their shadows by profile, and the parameters."""
        return [list(compress(views, which)) for views in self.shadows], list(
            compress(self.live, which)
        )

    def reads(self, live: Sequence[Tensor]) -> bool:
        """Whether a run would read these tensors as they are now, and write where shadows are.

        A shadow gets other memory where it is shared with another process. Takes next to no time.
        """
        return self._watch.holds(live) and self._addresses == list(
            map(Tensor.data_ptr, self._homes)
        )

    @property
    def num_pieces(self) -> int:
        """Tensors that a run updates, those as one that lie in memory as if they were."""
        rows = 0 if self._table is None else self._table.num_rows
        rows += sum(len(table.live) for table in self._launches)
        rows += sum(len(offload.live) for offload in self._offloads)
        return rows + sum(len(batch.live) for batch in self._batches)

    @property
    def transfer_bytes(self) -> int:
        """Memory that parameters pass through to a shadow on the host."""
        return sum(offload.num_bytes for offload in self._offloads)

    @torch.no_grad()
    def run(self, weights: Sequence[float], *, overlap: bool = False) -> None:
        """Update every shadow in place; ``weights[k]`` is ``1 - decay`` of profile ``k``.

        Only after :meth:`reads` has said yes: some tensors are read by the address that they had;
        and after :meth:`settle`. No collective, no host synchronisation, no temporary beyond the
        stage buffer.

        Args:
            overlap: read the parameters of a GPU beside what its current stream does. They must not
                change before :meth:`release`.
        """
        if self._reference:
            count = lerp_reference(self.shadows, self.live, weights, guard=self.guard)
            if self.guard:
                self._counter(count.device).add_(count)
        if self._table is not None:
            self._skipped_by_table += self._table.lerp(weights, guard=self.guard)
        for offload in self._offloads:
            offload.begin(weights)
        for table in self._launches:
            if overlap:
                self._launch_beside(table, weights)
            else:
                table.lerp(weights, self._counter(table.device) if self.guard else None)
        for batch in self._batches:
            if self.guard:
                device = batch.shadows[0][0].device
                lerp_batch_guarded(batch, weights, self._counter(device))
            else:
                lerp_batch(batch, weights)
        if not overlap:
            self.release()

    @torch.no_grad()
    def run_by_step(self) -> None:
        """As :meth:`run`, by the weights of the step that the device counts.

        One launch for each dtype of shadows, and nothing that a graph could not record.
        """
        assert self._by_step is not None and not self.not_launched
        for table in self._launches:
            table.lerp(self._by_step, self._counter(table.device) if self.guard else None)

    def _launch_beside(self, table: LaunchTable, weights: Sequence[float]) -> None:
        device = table.device
        counter = self._counter(device, beside=True) if self.guard else None
        if device not in self._beside:
            side = self._beside[device] = SideStream(device)
            for each in self._launches:
                if each.device == device:
                    side.hold(each.tensors)
            self._sides.append(side)
        if counter is not None:
            self._beside[device].hold([counter])
        with self._beside[device].entered():
            table.lerp(weights, counter)

    @property
    def under_way(self) -> bool:
        """Whether a run may go on behind the call."""
        return bool(self._sides) and (
            any(side.is_ahead for side in self._sides)
            or any(offload.is_under_way for offload in self._offloads)
        )

    def release(self) -> None:
        """From now on parameters may change: what current streams do comes after the reading."""
        for side in self._sides:
            if side.is_ahead:
                side.follow()

    def settle(self) -> BaseException | None:
        """Have the last run written all shadows before anything that is begun from now on.

        Waits for a run that goes on on the host.

        Returns:
            What it has failed with there, if it has.
        """
        self.release()
        failures = [offload.finish() for offload in self._offloads]
        return next((failure for failure in failures if failure is not None), None)

    def _counter(self, device: torch.device, *, beside: bool = False) -> Tensor:
        # A stream has a counter of its own: not all that counts adds in one step.
        key = (device, beside)
        if key not in self._skipped:
            with torch.inference_mode(False):
                self._skipped[key] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[key]

    def take_skipped(self) -> int:
        """Elements skipped since the last call, once settled. Waits for the device."""
        total = self._skipped_by_table
        self._skipped_by_table = 0
        for count in self._skipped.values():
            total += int(count)
            count.zero_()  # in its place, which a graph may have recorded
        return total + sum(offload.take_skipped() for offload in self._offloads)

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
        if any(offload.narrows for offload in self._offloads):
            return False  # which is found out tensor by tensor
        if not all(is_finite(Batch(t.live, []), largest=t.largest) for t in self._launches):
            return False
        seen = [Batch(offload.live, []) for offload in self._offloads]
        return all(map(is_finite, [*seen, *self._batches]))

    @torch.no_grad()
    def heal(self, positions: Iterable[int]) -> None:
        """Elements of these shadows that are NaN or Inf become the parameter's."""
        for i in positions:
            for views in self.shadows:
                heal(views[i], self.live[i])


def _table_of(
    live: Tensor, views: Sequence[Tensor]
) -> tuple[str, torch.device, torch.dtype | None] | None:
    """The table that a parameter and its shadows go into; ``None`` for none.

    One launch is for one dtype of shadows, and a call of the extension for all.
    """
    if launches.takes(live, views) and launches.triton_module() is not None:
        return "launch", live.device, views[0].dtype
    if fused.takes(live, views) and fused.extension() is not None:
        return "extension", live.device, None
    return None


def _require_fused(types: Collection[str]) -> None:
    """Refuse what was asked for by name and is not there."""
    if "cpu" in set(types) - launches.DEVICES and fused.extension() is None:
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
