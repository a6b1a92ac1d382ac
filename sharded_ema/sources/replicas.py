"""Replicas that share the work, whatever keeps them equal.

All replicas hold the same parameters after every step, so each keeps the shadow of 1/R of them
and nothing is communicated until somebody wants the whole average: a swap gathers it once, in
blocks of bounded size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_ema.errors import StateError
from sharded_ema.layout import Box, FlatRange, Slice, divide
from sharded_ema.sources.base import Inventory, Shard, ShardSource, read
from sharded_ema.values import FlatShard, range_pieces

# Elements that one gather brings to every rank (64 MiB of fp32).
GATHER_NUMEL = 1 << 24


class ReplicatedSource(ShardSource):
    """Each replica averages a slice of the parameters.

    Args:
        inventory: the tensors of the target.
        group: process group of the replicas.
        shard_replicas: ``False`` keeps the whole shadow on every replica, so that a swap needs
            no communication.
    """

    def __init__(
        self, inventory: Inventory, group: dist.ProcessGroup, *, shard_replicas: bool
    ) -> None:
        self.inventory = inventory
        self._group = group
        self.ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank(group)
        self.swap_is_collective = shard_replicas and len(self.ranks) > 1
        tensors = [named.tensor for named in inventory.averaged]
        num_parts = len(self.ranks) if shard_replicas else 1
        # A buffer may differ between replicas (batch statistics), so nobody can keep another's
        # slice of it; and where C order is not memory order a slice would not be a view.
        shared = [isinstance(t, nn.Parameter) for t in tensors]
        self._parts: list[list[Slice]] = divide(
            [t.numel() if s else 0 for t, s in zip(tensors, shared, strict=True)],
            num_parts,
            indivisible=[not t.is_contiguous() for t in tensors],
        )
        mine = {s.index: s.range for s in self._parts[self._rank if shard_replicas else 0]}
        writes = shard_replicas or self.is_first_rank
        self.shards = []
        for i, named in enumerate(inventory.averaged):
            shape = tuple(named.tensor.shape)
            span = mine.get(i, FlatRange(0, 0))
            if not shared[i]:
                shard = Shard(named, shape, Box.whole(shape), writes=self.is_first_rank)
            elif span.numel == named.tensor.numel():
                shard = Shard(named, shape, Box.whole(shape), writes=writes)
            else:
                shard = Shard(named, shape, Box.whole(shape), span, writes=writes)
            self.shards.append(shard)
        self._views: dict[int, tuple[int, Tensor]] = {}

    def averaged_tensor(self, index: int) -> Tensor:
        """What is averaged for the parameter at ``index``: itself, or a more precise copy."""
        return read(self.inventory.averaged[index])

    def live(self) -> list[Tensor]:
        return [
            self.averaged_tensor(i) if shard.range is None else self._slice(i, shard.range)
            for i, shard in enumerate(self.shards)
        ]

    def _slice(self, index: int, span: FlatRange) -> Tensor:
        """A view of a slice, made again only when the tensor moved."""
        tensor = self.averaged_tensor(index)
        pointer, view = self._views.get(index, (0, tensor))
        if index not in self._views or pointer != tensor.data_ptr():
            if span.numel and not tensor.is_contiguous():
                raise StateError(
                    f"parameter {self.shards[index].name.fqn} changed its memory format after the "
                    "average was made; make a new ShardedEMA after model.to(memory_format=...)"
                )
            flat = tensor.detach()
            flat = flat.view(-1)[span.start : span.stop] if span.numel else flat.new_empty(0)
            pointer, view = tensor.data_ptr(), flat
            self._views[index] = (pointer, view)
        return view

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        out: list[Tensor] = []
        for shard, tensor in zip(self.shards, tensors, strict=True):
            if shard.range is None:
                pieces = [(shard.box, tensor)]
            else:
                pieces = range_pieces(shard.shape, shard.range, tensor)
            out.append(
                FlatShard(
                    shard.shape,
                    pieces,
                    dtype=tensor.dtype,
                    device=tensor.device,
                    writes=shard.writes,
                )
            )
        return out

    def swap_targets(self) -> list[Tensor]:
        return [read(shard.name) for shard in self.shards]

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        self.fill(self.swap_targets(), tensors)

    @torch.no_grad()
    def fill(self, targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Fill whole ``targets`` from the slices that the replicas hold, ``tensors`` being ours."""
        for shard, target, tensor in zip(self.shards, targets, tensors, strict=True):
            if shard.range is None:
                target.copy_(tensor)
        if not self.swap_is_collective:
            return
        self._broadcast_strided(targets)
        for device in sorted({t.device for t in targets}, key=str):
            self._gather(device, tensors, targets)

    def _broadcast_strided(self, targets: Sequence[Tensor]) -> None:
        """Hand out the tensors that one replica keeps whole because they cannot be sliced."""
        for owner, slices in enumerate(self._parts):
            for part in slices:
                target = targets[part.index]
                if target.is_contiguous():
                    continue
                # The owner's target already holds the average, converted as everybody needs it.
                whole = target.contiguous()
                dist.broadcast(whole, self.ranks[owner], group=self._group)
                target.copy_(whole)

    def _gather(
        self, device: torch.device, tensors: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> None:
        """All slices on ``device`` to all replicas, a bounded block of each at a time."""
        dtype = tensors[0].dtype
        own: list[Tensor] = []
        streams: list[list[Tensor]] = []
        for rank, slices in enumerate(self._parts):
            stream = []
            for part in slices:
                target = targets[part.index]
                if target.is_contiguous() and target.device == device:
                    stream.append(target.view(-1)[part.range.start : part.range.stop])
                    if rank == self._rank:
                        own.append(tensors[part.index].reshape(-1))
            streams.append(stream)
        longest = max(sum(t.numel() for t in stream) for stream in streams)
        block = min(longest, max(1, GATHER_NUMEL // len(self.ranks)))
        if not longest:
            return
        send = torch.zeros(block, dtype=dtype, device=device)
        received = torch.empty(len(self.ranks), block, dtype=dtype, device=device)
        for start in range(0, longest, block):
            for position, piece in _window(own, start, start + block):
                send[position : position + piece.numel()].copy_(piece)
            dist.all_gather(list(received), send, group=self._group)
            for row, stream in zip(received, streams, strict=True):
                for position, piece in _window(stream, start, start + block):
                    piece.copy_(row[position : position + piece.numel()])


def _window(stream: Sequence[Tensor], start: int, stop: int) -> list[tuple[int, Tensor]]:
    """Parts of the concatenated 1-D tensors that lie in ``start:stop``, with their position."""
    found = []
    offset = 0
    for tensor in stream:
        low, high = max(start, offset), min(stop, offset + tensor.numel())
        if low < high:
            found.append((low - start, tensor[low - offset : high - offset]))
        offset += tensor.numel()
    return found
