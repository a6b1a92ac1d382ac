"""Replicas that share the work, whatever keeps them equal.

Tensors that are equal on R ranks after every step need be averaged once: each rank keeps the
shadow of 1/R of them, and nothing is communicated until somebody wants the whole average. A swap
gathers it then, once, in blocks of bounded size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_ema.errors import StateError, UnsupportedLayoutError
from sharded_ema.model.internals.pytorch import reached_devices
from sharded_ema.model.inventory import Inventory, Named
from sharded_ema.model.layout import Box, FlatRange, divide
from sharded_ema.model.memory import Layouts, pick
from sharded_ema.model.pieces import FlatShard, range_pieces
from sharded_ema.model.precision import real_view
from sharded_ema.model.sources.protocol import Shard

# Elements that one gather brings to every rank (64 MiB of fp32).
GATHER_NUMEL = 1 << 24

Groups = tuple[dist.ProcessGroup, ...]
#: Position of a tensor, and the elements of it that one replica keeps.
Slice = tuple[int, FlatRange]


class Replicas:
    """Tensors of which every replica holds equal copies and keeps a slice.

    Args:
        groups: process groups of this rank; its replicas are the ranks that it reaches through one
            or several of them, as along the axes of a mesh. None: it is the only one.
        tensors: what is divided, of the same size and memory order on all replicas.

    Raises:
        UnsupportedLayoutError: the groups cannot communicate where the tensors lie.
    """

    def __init__(self, groups: Groups, tensors: Sequence[Tensor]) -> None:
        self._groups = groups
        for group in groups:
            _refuse_unreachable(group, tensors)
        self.size = math.prod(dist.get_world_size(group) for group in groups)
        rank = 0
        for group in groups:  # coordinates along the groups, as digits of one number
            rank = rank * dist.get_world_size(group) + dist.get_rank(group)
        # Where C order is not memory order a slice would not be a view.
        self._parts = divide(
            [t.numel() for t in tensors],
            self.size,
            indivisible=[not t.is_contiguous() for t in tensors],
        )
        self._rank = rank
        #: This rank's elements of every tensor, in C order.
        self.spans = [self._parts[rank].get(i, FlatRange(0, 0)) for i in range(len(tensors))]
        #: Positions of tensors that no replica keeps whole.
        self.divided = [
            i
            for i, tensor in enumerate(tensors)
            if max(part[i].numel if i in part else 0 for part in self._parts) < tensor.numel()
        ]

    @torch.no_grad()
    def gather(self, targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Fill whole ``targets`` from the slices of all replicas, ``tensors`` being this rank's.

        Collective over the groups, one after another from the last: along each, the replicas hand
        on what they have by then, already converted to what the targets are.
        """
        for target, tensor, span in zip(targets, tensors, self.spans, strict=True):
            _put(target, tensor, span)
        known = 1
        for group in reversed(self._groups):
            size = dist.get_world_size(group)
            first = self._rank // (known * size) * (known * size)
            blocks = [
                [s for part in self._parts[start : start + known] for s in part.items()]
                for start in range(first, first + known * size, known)
            ]
            _broadcast_strided(group, blocks, targets)
            kinds = {(t.device, t.dtype) for t in targets}
            for device, dtype in sorted(kinds, key=str):
                _all_gather(group, [list(_views(b, targets, device, dtype)) for b in blocks])
            known *= size

    @torch.no_grad()
    def gather_one(self, index: int, target: Tensor, tensor: Tensor) -> None:
        """Fill the whole ``target`` of one tensor from its slices, ``tensor`` being this rank's.

        Collective over the groups, and without memory beside the target: each replica broadcasts
        what it has into its place, along each group what it has by then.
        """
        _put(target, tensor, self.spans[index])
        known = 1
        for group in reversed(self._groups):
            size = dist.get_world_size(group)
            first = self._rank // (known * size) * (known * size)
            for member in range(size):
                start = first + member * known
                parts = [p[index] for p in self._parts[start : start + known] if index in p]
                if parts:  # neighbours keep neighbouring slices
                    _broadcast(group, member, target, FlatRange(parts[0].start, parts[-1].stop))
            known *= size


def _put(target: Tensor, tensor: Tensor, span: FlatRange) -> None:
    """Copy a slice to its place."""
    if span.numel == target.numel():
        target.copy_(tensor)
    elif span.numel:
        target.view(-1)[span.start : span.stop].copy_(tensor)


def _broadcast(group: dist.ProcessGroup, owner: int, target: Tensor, span: FlatRange) -> None:
    if target.is_contiguous():
        part = real_view(target.view(-1)[span.start : span.stop])
        dist.broadcast(part, group=group, group_src=owner)
    else:  # it is not divided
        whole = target.contiguous()
        dist.broadcast(real_view(whole), group=group, group_src=owner)
        target.copy_(whole)


def _refuse_unreachable(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> None:
    reached = reached_devices(group)
    for kind in {tensor.device.type for tensor in tensors} - reached:
        raise UnsupportedLayoutError(
            f"there are replicas on {kind}, as with CPU offload, and their process group reaches "
            f"{', '.join(sorted(reached))} only, so that no swap could gather their average; "
            'init_process_group("cpu:gloo,cuda:nccl"), or pass shard_replicas=False'
        )


def _broadcast_strided(
    group: dist.ProcessGroup, blocks: Sequence[Sequence[Slice]], targets: Sequence[Tensor]
) -> None:
    """Hand out the tensors that one replica keeps whole because they cannot be sliced."""
    for owner, slices in enumerate(blocks):
        for index, _ in slices:
            target = targets[index]
            if not target.is_contiguous():
                _broadcast(group, owner, target, FlatRange(0, target.numel()))


def _views(
    slices: Sequence[Slice], targets: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    for index, span in slices:
        target = targets[index]
        if target.is_contiguous() and target.device == device and target.dtype == dtype:
            yield real_view(target.view(-1)[span.start : span.stop]).view(-1)


def _all_gather(group: dist.ProcessGroup, streams: Sequence[Sequence[Tensor]]) -> None:
    """Fill each member's stream of real 1-D tensors from that member, a block at a time."""
    longest = max(sum(t.numel() for t in stream) for stream in streams)
    if not longest:
        return
    block = min(longest, max(1, GATHER_NUMEL // len(streams)))
    example = next(t for stream in streams for t in stream)
    own = dist.get_rank(group)
    send = example.new_zeros(block)
    received = example.new_empty(len(streams), block)
    for start in range(0, longest, block):
        for position, piece in _window(streams[own], start, start + block):
            send[position : position + piece.numel()].copy_(piece)
        dist.all_gather(list(received), send, group=group)
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


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where an averaged tensor lies.

    Attributes:
        box: this rank's block of the global tensor.
        groups: groups over which the block is replicated, see :class:`Replicas`.
        writes: whether of the equal copies this rank's is the one to write, if it is not divided.
        range: elements of the block that this rank has (1-D), or ``None`` for the block itself.
        order: memory order in which ``range`` counts, see :class:`Shard`.
    """

    box: Box
    groups: Groups
    writes: bool
    range: FlatRange | None = None
    order: tuple[int, ...] | None = None

    def part(self, span: FlatRange) -> FlatRange | None:
        """Elements ``span`` of what this rank has, as elements of the block."""
        if self.range is None:
            return None if span.numel == self.box.numel else span
        return FlatRange(self.range.start + span.start, self.range.start + span.stop)


class Shares:
    """This rank's part of every averaged tensor: its block, or a slice of a replicated block.

    Args:
        inventory: the tensors of the model.
        places: where each averaged tensor lies.
        targets: this rank's blocks, which a swap overwrites.
        shard_replicas: ``False`` keeps the whole block on every replica, so that a swap needs
            no communication.

    Attributes:
        shards: what this rank averages.
        places: as given, without groups if replicas do not share.
        parted: positions of the tensors that replicas share.
        together: whether filling whole tensors communicates.
    """

    def __init__(
        self,
        inventory: Inventory,
        places: Sequence[Place],
        targets: Sequence[Tensor],
        *,
        shard_replicas: bool,
    ) -> None:
        self.places = list(places) if shard_replicas else [replace(p, groups=()) for p in places]
        # Tensors with the same replicas are divided together, so that the shares come out even.
        alike: dict[tuple[str, ...], list[int]] = {}
        for i, place in enumerate(self.places):
            alike.setdefault(tuple(g.group_name for g in place.groups), []).append(i)
        self._replicas: list[tuple[list[int], Replicas]] = []
        self._divided: list[int] = []
        spans: dict[int, FlatRange] = {}
        found: dict[int, Shard] = {}
        for members in alike.values():
            replicas = Replicas(self.places[members[0]].groups, [targets[i] for i in members])
            self._replicas.append((members, replicas))
            self._divided += (members[i] for i in replicas.divided)
            for i, span in zip(members, replicas.spans, strict=True):
                place = self.places[i]
                spans[i] = span
                found[i] = Shard(
                    inventory.averaged[i],
                    place.box,
                    place.part(span),
                    place.order,
                    writes=place.writes or replicas.size > 1,
                )
        self.shards = [found[i] for i in range(len(places))]
        self.parted = [i for members, r in self._replicas if r.size > 1 for i in members]
        self.together = bool(self.parted)
        # What this rank has not all of; the rest of its tensors is averaged as it is.
        self._spans = {i: spans[i] for i in spans if spans[i].numel < targets[i].numel()}
        self._divided.sort()
        self._pick = pick(self._divided, len(places))
        self._shapes = [targets[i].shape for i in self._divided]
        self._layouts: Layouts | None = None
        self._parts: dict[int, Tensor] = {}

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """This rank's parts of its blocks, as views; they are made again only when one moved.

        Raises:
            StateError: a tensor of which replicas keep slices has another shape or is no longer
                contiguous; also on those that keep nothing of it.
        """
        if not self._spans:
            return tensors
        divided = self._pick(tensors)
        if self._layouts is None or not self._layouts.hold(divided):
            for i, tensor, shape in zip(self._divided, divided, self._shapes, strict=True):
                _refuse_changed(self.shards[i], tensor, shape)
            self._parts = {i: _cut(span, tensors[i]) for i, span in self._spans.items()}
            self._layouts = Layouts(divided)
        found = list(tensors)
        for i, part in self._parts.items():
            found[i] = part
        return found

    def fill(self, targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Fill whole ``targets``, one for each shard, of which this rank holds ``tensors``."""
        for members, replicas in self._replicas:
            replicas.gather([targets[i] for i in members], [tensors[i] for i in members])

    def fill_one(self, index: int, target: Tensor, tensor: Tensor) -> None:
        """Fill the whole ``target`` of one shard, of which this rank holds ``tensor``."""
        for members, replicas in self._replicas:
            if index in members:
                replicas.gather_one(members.index(index), target, tensor)

    def stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Shadows of this rank's parts as values of the global shapes."""
        return [stored_shard(s, t) for s, t in zip(self.shards, tensors, strict=True)]


def stored_shard(shard: Shard, tensor: Tensor) -> FlatShard:
    """A shadow as a value of the global shape."""
    if shard.range is not None:
        pieces = range_pieces(shard.box, shard.range, tensor, shard.order)
    else:
        pieces = [(shard.box, tensor)] if shard.box.numel else []
    return FlatShard(
        shard.shape, pieces, dtype=tensor.dtype, device=tensor.device, writes=shard.writes
    )


def _cut(span: FlatRange, tensor: Tensor) -> Tensor:
    """A slice as a view."""
    if not span.numel:
        return tensor.detach().new_empty(0)
    return tensor.detach().view(-1)[span.start : span.stop]


def _refuse_changed(shard: Shard, tensor: Tensor, shape: torch.Size) -> None:
    """Refuse a tensor of which slices are no longer views of the same elements."""
    if tensor.shape != shape:
        raise StateError(
            f"parameter {shard.name.fqn} had local shape {tuple(shape)} when the average was made "
            f"and has {tuple(tensor.shape)} now; make a new ShardedEMA after resizing a model"
        )
    if not tensor.is_contiguous():
        raise StateError(
            f"parameter {shard.name.fqn} changed its memory format after the average was made; "
            "make a new ShardedEMA after model.to(memory_format=...)"
        )


def leads(groups: Groups) -> bool:
    """Whether this rank is the first of its replicas, which writes what is not divided."""
    return all(dist.get_rank(group) == 0 for group in groups)


def whole_copy(named: Named, groups: Groups) -> Place:
    """The place of a tensor that all ranks reached over ``groups`` hold whole.

    A buffer has no replicas: its values may differ (batch statistics), so nobody can keep
    another's slice of it.
    """
    shared = groups if named.is_parameter else ()
    return Place(Box.whole(named.tensor.shape), shared, writes=leads(groups))
