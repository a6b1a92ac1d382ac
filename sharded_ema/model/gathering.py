"""Tensors put together of the pieces that the ranks hold, one at a time, on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_ema.errors import BindError
from sharded_ema.model.agreement import Ranks
from sharded_ema.model.layout import Box, Shape
from sharded_ema.model.pieces import FlatShard, pieces_of


class _Whole(NamedTuple):
    """A tensor, and which rank sends each block of it."""

    shape: Shape
    dtype: torch.dtype
    sent: dict[Box, int]


@torch.no_grad()
def gather_each(
    values: Mapping[str, Tensor],
    ranks: Ranks,
    purpose: str,
    *,
    everywhere: bool,
    cast: Callable[[str, torch.dtype], torch.dtype] = lambda key, dtype: dtype,
) -> Iterator[tuple[str, Tensor | None]]:
    """Whole tensors, one after the other. Collective: all ranks go through all of them.

    A rank holds one piece of its own beside what is given out. Every block is sent once, by the
    first rank that has it, in its final dtype.

    Args:
        values: as in a state dict: by key, with this rank's pieces.
        purpose: for messages.
        everywhere: whether each rank gets the tensors, or only the first.
        cast: dtype that a tensor is given out in.

    Yields:
        Key and tensor, contiguous on the CPU; on the ranks that get none, key and ``None``.

    Raises:
        BindError: the ranks together do not have all of a tensor.
        AbsentRankError: a rank did not come, or was lost.
    """
    own = {key: _written(value) for key, value in values.items()}
    table = {
        key: (tuple(value.shape), cast(key, value.dtype), [box for box, _ in own[key]])
        for key, value in values.items()
    }
    plan: dict[str, _Whole] = {}
    for rank, of_rank in enumerate(ranks.gather(table, purpose)):
        for key, (shape, dtype, boxes) in of_rank.items():
            sent = plan.setdefault(key, _Whole(shape, dtype, {})).sent
            for box in boxes:
                if box.numel:
                    sent.setdefault(box, rank)
    for key, whole in plan.items():
        _check_complete(key, whole)
    for key, whole in plan.items():
        pieces = {box: piece for box, piece in own.get(key, ()) if box.numel}
        with ranks.talking(purpose):
            full = _put_together(whole, pieces, ranks, everywhere=everywhere)
        yield key, full


def _written(value: Tensor) -> list[tuple[Box, Tensor]]:
    return pieces_of(value) if not isinstance(value, FlatShard) or value.writes else []


def _check_complete(key: str, whole: _Whole) -> None:
    total = Box.whole(whole.shape).numel
    there = sum(box.numel for box in whole.sent)
    if there != total:
        raise BindError(
            f"{key}: the ranks together hold {there} of {total} elements, so it cannot be put "
            "together; make the ShardedEMA of the whole wrapped model on every rank"
        )


def _put_together(
    whole: _Whole, pieces: Mapping[Box, Tensor], ranks: Ranks, *, everywhere: bool
) -> Tensor | None:
    """One tensor of its pieces; ``None`` on a rank that gets none."""
    first = ranks.rank == 0
    full = torch.empty(whole.shape, dtype=whole.dtype) if first or everywhere else None
    for box, rank in whole.sent.items():
        if rank == ranks.rank:
            piece = pieces[box].detach().to("cpu", whole.dtype)
            if first:
                _place(full, box, piece)
            else:
                dist.send(as_bytes(piece.contiguous()), group=ranks.group, group_dst=0)
        elif first:
            piece = torch.empty(box.sizes, dtype=whole.dtype)
            dist.recv(as_bytes(piece), group=ranks.group, group_src=rank)
            _place(full, box, piece)
    if everywhere and ranks.size > 1 and whole.sent:
        assert full is not None
        dist.broadcast(as_bytes(full), group=ranks.group, group_src=0)
    return full


def _place(full: Tensor | None, box: Box, piece: Tensor) -> None:
    assert full is not None
    full[box.slices].copy_(piece)


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: process groups do not know every dtype."""
    return tensor.reshape(-1).view(torch.uint8)
