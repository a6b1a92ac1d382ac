"""Which chunks hold given pieces of tensors, found without an object for each chunk of others.

At a thousand ranks a table has millions of rows, of which a rank needs a few thousand. It is gone
through in slabs of columns, and only the rows that are needed become chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint.reading.chunks import Chunk, ChunkTable, TableIndex, tiles
from sharded_ema.checkpoint.reading.dcp import DcpIndex
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Box

# Rows that are compared at a time; some 40 MB with all that is made of them.
_SLAB_ROWS = 1 << 18

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """What one chunk holds of one piece.

    Attributes:
        piece: position of the piece among those that were asked for.
        key: of the tensor.
        chunk: that holds it.
        box: the elements, counted from the start of the tensor.
    """

    piece: int
    key: str
    chunk: Chunk
    box: Box


def select(checkpoint: Checkpoint, pieces: Sequence[tuple[str, Box]]) -> list[Part]:
    """Where pieces of tensors lie.

    Args:
        pieces: key of a tensor in the checkpoint and the elements that are needed, at least one.

    Returns:
        The parts of all pieces: those of a piece fill it with neither hole nor overlap.

    Raises:
        CheckpointCorruptError: the chunks do not fit the tensors or the files.
    """
    index = checkpoint.index
    if isinstance(index, TableIndex):
        parts, incomplete = _in_table(checkpoint, index, pieces)
    else:
        assert isinstance(index, DcpIndex)
        parts = list(_in_entries(checkpoint, index, pieces))
        incomplete = set(range(len(pieces)))
    for part in parts:
        checkpoint.tensors[part.key].check((part.chunk,))
    found: dict[int, list[Box]] = {number: [] for number in incomplete}
    for part in parts:
        if part.piece in found:
            found[part.piece].append(part.box)
    for number, boxes in found.items():
        key, piece = pieces[number]
        if not tiles((box.within(piece) for box in boxes), piece.sizes):
            raise CheckpointCorruptError(
                f"{checkpoint.path}: the chunks of {key} leave holes or overlap at "
                f"{piece.offsets} of size {piece.sizes}"
            )
    return parts


def _in_entries(
    checkpoint: Checkpoint, index: DcpIndex, pieces: Sequence[tuple[str, Box]]
) -> Iterator[Part]:
    for number, (key, piece) in enumerate(pieces):
        for at in index.locations(key):
            assert at.box is not None
            checkpoint.tensors[key].check_box(at.box)
            box = piece.common(at.box)
            if box is not None:
                yield Part(number, key, index.chunk(key, at), box)


# ---------------------------------------------------------------------- in the chunk table


def _in_table(
    checkpoint: Checkpoint, index: TableIndex, pieces: Sequence[tuple[str, Box]]
) -> tuple[list[Part], set[int]]:
    """The parts, and which pieces are not each the part of one chunk."""
    table = index.table
    ids = {key: number for number, key in enumerate(index.tensors)}
    ndims = np.fromiter((len(box.sizes) for _, box in pieces), np.int64, len(pieces))
    if (ndims > table.width).any():
        raise CheckpointCorruptError(
            f"{checkpoint.path}: the chunk table has room for {table.width} dimensions, and a "
            f"tensor has {ndims.max()}"
        )
    tensors = np.fromiter((ids[key] for key, _ in pieces), np.int64, len(pieces))
    starts = np.zeros((len(pieces), table.width), np.int64)
    stops = np.ones((len(pieces), table.width), np.int64)
    for number, (_, box) in enumerate(pieces):
        starts[number, : len(box.offsets)] = box.offsets
        stops[number, : len(box.offsets)] = [
            o + n for o, n in zip(box.offsets, box.sizes, strict=True)
        ]
    numbers, rows = select_rows(table, len(ids), tensors, starts, stops)
    table.check(rows, ndims[numbers])
    first = np.maximum(rows["offsets"], starts[numbers])
    last = np.minimum(rows["offsets"] + rows["sizes"], stops[numbers])
    whole = (first == starts[numbers]).all(1) & (last == stops[numbers]).all(1)
    alone = np.bincount(numbers, minlength=len(pieces)) == 1
    alone[numbers[~whole]] = False
    parts = []
    chunks = table.chunks(rows, ndims[numbers].tolist())
    boxes = zip(first.tolist(), (last - first).tolist(), strict=True)
    for number, chunk, (offsets, sizes) in zip(numbers.tolist(), chunks, boxes, strict=True):
        key, box = pieces[number]
        if not alone[number]:
            ndim = len(box.sizes)
            box = Box(tuple(offsets[:ndim]), tuple(sizes[:ndim]))
        index.check_places(key, (chunk,))
        parts.append(Part(number, key, chunk, box))
    return parts, set(np.flatnonzero(~alone).tolist())


def select_rows(
    table: ChunkTable, num_tensors: int, tensors: Ints, starts: Ints, stops: Ints
) -> tuple[Ints, NDArray[np.void]]:
    """The rows of a chunk table that hold something of given pieces; nothing of them is checked.

    Args:
        num_tensors: in the manifest.
        tensors: ``(pieces,)``, the id of the tensor that each is a piece of.
        starts, stops: ``(pieces, width)``, first element and the one after the last per dimension;
            0 and 1 in dimensions that the tensor does not have.

    Returns:
        For each pair of a piece and a row that holds some of it, the position of the piece and the
        row, in the order of the table; see :meth:`.ChunkTable.records`.
    """
    order = np.argsort(tensors, kind="stable")
    tensors, starts, stops = tensors[order], starts[order], stops[order]
    # Of each tensor, where its pieces begin; those of unknown ones are none.
    bounds = np.append(np.searchsorted(tensors, np.arange(num_tensors + 1)), len(tensors))
    found = []
    for slab in range(0, table.num_rows, _SLAB_ROWS):
        rows = table.records(slab, min(_SLAB_ROWS, table.num_rows - slab))
        ids = np.where(rows["tensor"] < 0, num_tensors, np.minimum(rows["tensor"], num_tensors))
        counts = bounds[ids + 1] - bounds[ids]
        at = np.repeat(np.arange(len(rows)), counts)
        # Rows before this one that have a pair, subtracted from a count over all pairs.
        nth = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = bounds[ids[at]] + nth
        for dim in range(table.width):
            offsets = rows["offsets"][at, dim]
            both = (offsets < stops[pieces, dim]) & (
                offsets + rows["sizes"][at, dim] > starts[pieces, dim]
            )
            at, pieces = at[both], pieces[both]
        found.append((order[pieces], rows[at]))
    return np.concatenate([np.empty(0, np.int64), *(p for p, _ in found)]), np.concatenate(
        [table.records(0, 0), *(rows for _, rows in found)]
    )
