"""DeepSpeed ZeRO 1, 2 and 3: each rank averages its partition of the fp32 master weights.

DeepSpeed flattens parameters into buffers and gives each rank a piece of those, its *master
partition*, cut without regard to where parameters end. The 16-bit weights of the model are the
masters, rounded. What this relies on, and where it is checked:

- The order of parameters in a buffer comes from the optimizer's own lists. The public getters
  assume another one under ``round_robin_gradients`` and return wrong data (DeepSpeed 0.19.8).
- :meth:`PartitionedSource.self_check` compares every slice of the masters with the parameter it
  is said to belong to, so that a changed layout is refused and never averaged.
- Padding lies between and behind the parameters, uninitialised in stage 3. No shard covers it.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_ema.errors import BindError, StateError
from sharded_ema.model.inventory import (
    Backup,
    Inventory,
    Named,
    Shard,
    copy_into,
    is_rounded,
    read,
)
from sharded_ema.model.layout import Box, FlatRange
from sharded_ema.model.pieces import FlatShard, range_pieces, whole
from sharded_ema.model.sources.zero_pipeline import EngineSource


@dataclass(frozen=True, slots=True)
class Partition:
    """Where this rank's piece of one parameter lies.

    Attributes:
        buffer: which of the optimizer's master partitions.
        offset: first element there.
        range: elements of the parameter in C order; empty if other ranks hold it all.
    """

    buffer: int
    offset: int
    range: FlatRange


class PartitionedSource(EngineSource):
    """Each rank averages its partition of the master weights; see :class:`EngineSource`."""

    swap_is_collective = True
    restore_is_collective = True

    def __init__(self, engine: Any, inventory: Inventory) -> None:
        super().__init__(engine, inventory)
        layout = self.layout()
        self.shards = []
        self._partitions: list[Partition | None] = []
        for named in inventory.averaged:
            shape = named.shape
            partition = layout[id(named.tensor)] if is_parameter(named) else None
            self._partitions.append(partition)
            if partition is None:
                writes = self.writes_whole(named.fqn)
                shard = Shard(named, shape, Box.whole(shape), writes=writes)
            else:
                writes = not self.is_borrowed(named.fqn)
                shard = Shard(named, shape, Box.whole(shape), partition.range, writes=writes)
            self.shards.append(shard)
        self._pointers: list[int] = []
        self._views: list[Tensor] = []

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer; its lists are read anew at each use."""
        return self.engine.optimizer

    @abstractmethod
    def layout(self) -> dict[int, Partition]:
        """Where every parameter of the optimizer lies, by ``id``."""

    @abstractmethod
    def masters(self) -> Sequence[Tensor]:
        """This rank's master partitions: 1-D, fp32 unless the user chose bf16 masters."""

    @abstractmethod
    def weight_slice(self, index: int, partition: Partition) -> Tensor:
        """The memory that a swap overwrites for the parameter at ``index`` (1-D)."""

    @abstractmethod
    def seen_slice(self, named: Named, partition: Partition) -> Tensor:
        """What the model itself says those elements are (1-D)."""

    def live(self) -> list[Tensor]:
        masters = self.masters()
        pointers = [master.data_ptr() for master in masters]
        if pointers != self._pointers:
            self._views = [self._view(i, masters) for i in range(len(self.shards))]
            self._pointers = pointers
        if all(self._partitions):
            return self._views
        # Only averaged buffers must be looked up every time.
        return [
            view if partition else read(shard.name)
            for shard, partition, view in zip(
                self.shards, self._partitions, self._views, strict=True
            )
        ]

    def _view(self, index: int, masters: Sequence[Tensor]) -> Tensor:
        partition = self._partitions[index]
        if partition is None:
            return read(self.shards[index].name)
        master, span = masters[partition.buffer].detach(), partition.range
        if not span.numel:
            return master.new_empty(0)
        if master.numel() < partition.offset + span.numel:
            raise StateError(
                f"the master weights of parameter {self.shards[index].name.fqn} are not in memory; "
                "call engine.reload_states() before the next step or use of the average"
            )
        return master.narrow(0, partition.offset, span.numel)

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            whole(tensor, writes=shard.writes)
            if shard.range is None
            else FlatShard(
                shard.shape,
                range_pieces(shard.box, shard.range, tensor),
                dtype=tensor.dtype,
                device=tensor.device,
                writes=shard.writes,
            )
            for shard, tensor in zip(self.shards, tensors, strict=True)
        ]

    def slices(self) -> Iterator[tuple[int, Partition]]:
        """Position and place of every averaged parameter of which this rank holds something."""
        for index, partition in enumerate(self._partitions):
            if partition is not None and partition.range.numel:
                yield index, partition

    @torch.no_grad()
    def self_check(self) -> None:
        live = self.live()
        for index, partition in self.slices():
            named = self.shards[index].name
            seen = self.seen_slice(named, partition)
            if not is_rounded(seen, live[index]):
                raise BindError(
                    f"the weights of parameter {named.fqn} are not the {live[index].dtype} masters "
                    f"of {type(self.optimizer).__name__} in {seen.dtype}: either the weights were "
                    "changed behind DeepSpeed's back (load them before deepspeed.initialize, or "
                    "with engine.load_checkpoint), or this version of DeepSpeed lays out its "
                    "partitions in a way that is not known here"
                )

    def swap_targets(self) -> list[Tensor]:
        return [read(s.name) for s, p in zip(self.shards, self._partitions, strict=True) if not p]

    def back_up(self) -> Backup:
        # What is restored are the masters, rounded; so that must be what is there now.
        self.self_check()
        return super().back_up()

    @torch.no_grad()
    def write_weights(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite this rank's piece of the model's weights, and averaged buffers."""
        for index, partition in self.slices():
            self.weight_slice(index, partition).copy_(tensors[index])
        buffers = [t for t, p in zip(tensors, self._partitions, strict=True) if p is None]
        copy_into(self.swap_targets()[: len(buffers)], buffers)

    @abstractmethod
    def refresh(self) -> None:
        """Make the weights of the model from the masters again. Collective."""

    def restore(self, backup: Backup) -> None:
        super().restore(backup)
        self.refresh()

    def keep(self, tensors: Sequence[Tensor]) -> None:
        copy_into(self.live(), tensors)
        self.refresh()


class Zero12Source(PartitionedSource):
    """Stages 1 and 2, and ``BF16_Optimizer``: one flat buffer for each parameter group."""

    kind = "zero-1/2"

    @functools.cached_property
    def _names(self) -> tuple[str, str, str]:
        """Attributes of the optimizer: groups, partitions of the weights, masters."""
        if hasattr(self.optimizer, "bf16_groups"):
            return "bf16_groups", "bf16_partitioned_groups", "fp32_groups_flat_partition"
        return (
            "bit16_groups",
            "parallel_partitioned_bit16_groups",
            "single_partition_of_fp32_groups",
        )

    def layout(self) -> dict[int, Partition]:
        optimizer = self.optimizer
        found = {}
        for buffer, group in enumerate(getattr(optimizer, self._names[0])):
            # The order in the buffer, which is not that of the group under round_robin_gradients.
            orders = getattr(optimizer, "round_robin_bit16_groups", None)
            order = group if orders is None else orders[buffer]
            offsets = getattr(optimizer, "round_robin_bit16_offsets", None)
            starts = _running_sums(order) if offsets is None else offsets[buffer]
            size = self.masters()[buffer].numel()
            low = self._rank_in(buffer) * size
            for parameter, start in zip(order, starts, strict=True):
                first = min(max(low - start, 0), parameter.numel())
                last = min(max(low + size - start, first), parameter.numel())
                span = FlatRange(first, last)
                found[id(parameter)] = Partition(buffer, max(start - low, 0), span)
        return found

    def _rank_in(self, buffer: int) -> int:
        return dist.get_rank(self.optimizer.real_dp_process_group[buffer])

    def masters(self) -> Sequence[Tensor]:
        return getattr(self.optimizer, self._names[2])

    def _weight_partitions(self) -> list[Tensor]:
        """This rank's piece of every group's flat weights."""
        groups = getattr(self.optimizer, self._names[1])
        return [group[self._rank_in(buffer)] for buffer, group in enumerate(groups)]

    def weight_slice(self, index: int, partition: Partition) -> Tensor:
        weights = self._weight_partitions()[partition.buffer]
        return weights.narrow(0, partition.offset, partition.range.numel)

    def seen_slice(self, named: Named, partition: Partition) -> Tensor:
        span = partition.range
        return named.tensor.detach().reshape(-1)[span.start : span.stop]

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        self.write_weights(tensors)
        # DeepSpeed's own refresh copies each master over the weights of this rank and gathers
        # them. With the weights in the masters' place only the gathering is left.
        masters = self.masters()
        setattr(self.optimizer, self._names[2], self._weight_partitions())
        try:
            self.optimizer.update_lp_params()
        finally:
            setattr(self.optimizer, self._names[2], masters)

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class Zero3Source(PartitionedSource):
    """Stage 3: every parameter is cut into equal 1-D pieces, the last ones padded."""

    kind = "zero-3"

    def layout(self) -> dict[int, Partition]:
        found = {}
        for buffer, group in enumerate(self.optimizer.fp16_groups):  # one for each sub-group
            offset = 0
            for parameter in group:
                found[id(parameter)] = Partition(buffer, offset, _piece(parameter))
                offset += parameter.partition_numel()
        return found

    def masters(self) -> Sequence[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def seen_slice(self, named: Named, partition: Partition) -> Tensor:
        return _weights(named.tensor)

    def weight_slice(self, index: int, partition: Partition) -> Tensor:
        return _weights(self.shards[index].name.tensor)

    def _aliased(self) -> list[Tensor]:
        """Masters that are the weights themselves, as plain fp32 training may have them."""
        live = self.live()
        return [
            live[i]
            for i, partition in self.slices()
            if live[i].data_ptr() == self.weight_slice(i, partition).data_ptr()
        ]

    def swap_targets(self) -> list[Tensor]:
        return [*super().swap_targets(), *self._aliased()]

    # What is gathered here stays for training, even if it is an evaluation that swaps.
    @torch.inference_mode(False)
    @torch.no_grad()
    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        # Gathered copies are dropped before, and made anew after the pieces have changed.
        self.optimizer.checkpoint_event_prologue()
        self.write_weights(tensors)
        self.optimizer.checkpoint_event_epilogue()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        self.optimizer.checkpoint_event_prologue()
        live = self.live()
        for index, partition in self.slices():
            self.weight_slice(index, partition).copy_(live[index])
        self.optimizer.checkpoint_event_epilogue()

    def extra_value(self, named: Named) -> Tensor:
        if not hasattr(named.tensor, "ds_tensor"):
            return super().extra_value(named)
        shape, piece = named.shape, _weights(named.tensor)
        return FlatShard(
            shape,
            range_pieces(Box.whole(shape), _piece(named.tensor), piece),
            dtype=piece.dtype,
            device=piece.device,
            reads=False,
        )


def is_parameter(named: Named) -> bool:
    """Whether it is a parameter, and no averaged buffer."""
    return isinstance(named.tensor, nn.Parameter)


def _piece(parameter: Any) -> FlatRange:
    """Which elements of a stage-3 parameter this rank holds; the rest of its piece is padding."""
    size = parameter.partition_numel()
    first = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return FlatRange(first, min(first + size, parameter.ds_numel))


def _weights(parameter: Any) -> Tensor:
    """This rank's elements of a stage-3 parameter, without padding (1-D)."""
    return parameter.ds_tensor.detach().view(-1)[: _piece(parameter).numel]


def _running_sums(parameters: Sequence[Tensor]) -> list[int]:
    sums = [0]
    for parameter in parameters:
        sums.append(sums[-1] + parameter.numel())
    return sums[:-1]
