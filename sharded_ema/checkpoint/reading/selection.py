"""Which chunks hold given pieces of tensors, found without an object for each chunk of others.

At a thousand ranks a table has millions of rows, of which a rank needs a few thousand. It is gone
through in slabs of columns, and only the rows that are needed become chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint.reading.chunks import Chunk, TableIndex, tiles
from sharded_ema.checkpoint.reading.dcp import DcpIndex
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Box

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
#: Key of a tensor and the elements of it that are needed, at least one.
Wanted = tuple[str, Box]


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


def select(checkpoint: Checkpoint, pieces: Sequence[Wanted]) -> list[Part]:
    """Where pieces of the tensors of a checkpoint lie.

    Returns:
        The parts of all pieces: those of a piece fill it with neither hole nor overlap.

    Raises:
        CheckpointCorruptError: the chunks do not fit the tensors or the files.
    """
    index = checkpoint.index
    if not isinstance(index, TableIndex):
        assert isinstance(index, DcpIndex)
        return checked(checkpoint, pieces, list(_in_entries(checkpoint, index, pieces)))
    selection = Selection(checkpoint, index, pieces)
    for first, count in index.table.slabs():
        selection.take(index.table.records(first, count))
    return selection.parts()


def checked(
    checkpoint: Checkpoint,
    pieces: Sequence[Wanted],
    parts: list[Part],
    filled: frozenset[int] = frozenset(),
) -> list[Part]:
    """Parts of pieces, after a look whether they can be true and fill the pieces.

    Args:
        filled: pieces of which it is known that they are filled.

    Raises:
        CheckpointCorruptError: they do not.
    """
    boxes: dict[int, list[Box]] = {n: [] for n in range(len(pieces)) if n not in filled}
    for part in parts:
        checkpoint.tensors[part.key].check((part.chunk,))
        if part.piece in boxes:
            boxes[part.piece].append(part.box)
    for number, found in boxes.items():
        key, piece = pieces[number]
        if not tiles((box.within(piece) for box in found), piece.sizes):
            raise CheckpointCorruptError(
                f"{checkpoint.path}: the chunks of {key} leave holes or overlap at "
                f"{piece.offsets} of size {piece.sizes}"
            )
    return parts


def _in_entries(
    checkpoint: Checkpoint, index: DcpIndex, pieces: Sequence[Wanted]
) -> Iterator[Part]:
    for number, (key, piece) in enumerate(pieces):
        for at in index.locations(key):
            assert at.box is not None
            checkpoint.tensors[key].check_box(at.box)
            box = piece.common(at.box)
            if box is not None:
                yield Part(number, key, index.chunk(key, at), box)


class Selection:
    """The rows of a chunk table that hold something of given pieces.

    Args:
        checkpoint: of which the table is.
        index: of the checkpoint.
        pieces: that are needed.

    Raises:
        CheckpointCorruptError: a piece has more dimensions than the table.
    """

    def __init__(self, checkpoint: Checkpoint, index: TableIndex, pieces: Sequence[Wanted]) -> None:
        self._checkpoint = checkpoint
        self._index = index
        self._pieces = pieces
        width, count = index.table.width, len(pieces)
        ids = {key: number for number, key in enumerate(index.tensors)}
        self._ndims = np.fromiter((len(box.sizes) for _, box in pieces), np.int64, count)
        if (self._ndims > width).any():
            raise CheckpointCorruptError(
                f"{checkpoint.path}: the chunk table has room for {width} dimensions, and a tensor "
                f"has {self._ndims.max()}"
            )
        # What a tensor lacks of the dimensions counts as one of a single element.
        self._starts = np.zeros((count, width), np.int64)
        self._stops = np.ones((count, width), np.int64)
        for number, (_, box) in enumerate(pieces):
            ndim = len(box.sizes)
            self._starts[number, :ndim] = box.offsets
            self._stops[number, :ndim] = box.sizes
        self._stops += self._starts
        tensors = np.fromiter((ids[key] for key, _ in pieces), np.int64, count)
        self._order = np.argsort(tensors, kind="stable")
        # Where in that order the pieces of each tensor begin; one that is unknown has none.
        begins = np.searchsorted(tensors[self._order], np.arange(len(ids) + 1))
        self._begins = np.append(begins, count)
        self._found: list[tuple[Ints, NDArray[np.void]]] = []

    def take(self, rows: NDArray[np.void]) -> None:
        """Keep copies of those rows that hold something of a piece; nothing is checked here.

        Args:
            rows: see :meth:`.ChunkTable.records`.
        """
        unknown = len(self._begins) - 2
        ids = np.where(rows["tensor"] < 0, unknown, np.minimum(rows["tensor"], unknown))
        counts = self._begins[ids + 1] - self._begins[ids]
        # All pairs of a row and a piece of its tensor.
        at = np.repeat(np.arange(len(rows)), counts)
        nth = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = self._order[self._begins[ids[at]] + nth]
        for dim in range(self._starts.shape[1]):
            first = rows["offsets"][at, dim]
            last = first + rows["sizes"][at, dim]
            both = (first < self._stops[pieces, dim]) & (last > self._starts[pieces, dim])
            at, pieces = at[both], pieces[both]
        if len(at):
            self._found.append((pieces, rows[at]))

    def parts(self) -> list[Part]:
        """What the rows that were taken hold of the pieces.

        Raises:
            CheckpointCorruptError: see :func:`select`.
        """
        table, pieces = self._index.table, self._pieces
        numbers = np.concatenate([np.empty(0, np.int64), *(n for n, _ in self._found)])
        rows = np.concatenate([np.empty(0, table.row_type), *(rows for _, rows in self._found)])
        starts, stops, ndims = self._starts[numbers], self._stops[numbers], self._ndims[numbers]
        table.check(rows, ndims)
        first = np.maximum(rows["offsets"], starts)
        last = np.minimum(rows["offsets"] + rows["sizes"], stops)
        filled = _filled(len(pieces), numbers, first, last, starts, stops)
        alone = filled & (np.bincount(numbers, minlength=len(pieces)) == 1)
        parts = []
        chunks = table.chunks(rows, ndims.tolist())
        boxes = zip(first.tolist(), (last - first).tolist(), ndims.tolist(), strict=True)
        for number, chunk, (offsets, sizes, ndim) in zip(
            numbers.tolist(), chunks, boxes, strict=True
        ):
            key, box = pieces[number]
            if not alone[number]:
                box = Box(tuple(offsets[:ndim]), tuple(sizes[:ndim]))
            self._index.check_places(key, (chunk,))
            parts.append(Part(number, key, chunk, box))
        known = frozenset(np.flatnonzero(filled).tolist())
        return checked(self._checkpoint, pieces, parts, known)


def _filled(count: int, numbers: Ints, first: Ints, last: Ints, starts: Ints, stops: Ints) -> Flags:
    """Which pieces parts fill that lie one after the other in one dimension and span the others.

    Of those that are cut otherwise nothing is said.

    Args:
        count: of the pieces.
        numbers: ``(parts,)``, the piece of each part.
        first, last: ``(parts, width)``, of the part per dimension.
        starts, stops: the same of its piece.
    """
    cut = np.zeros((count, first.shape[1]), np.bool_)
    np.logical_or.at(cut, numbers, (first != starts) | (last != stops))
    dims = cut.argmax(1)[numbers]
    row = np.arange(len(numbers))
    begin, end = first[row, dims], last[row, dims]
    order = np.lexsort((begin, numbers))
    dims, numbers, begin, end = dims[order], numbers[order], begin[order], end[order]
    opens = np.append(True, numbers[1:] != numbers[:-1])[: len(numbers)]
    closes = np.append(opens[1:], True)[: len(numbers)]
    # Each part begins where the one before it ends, the first one where the piece does.
    expected = np.where(opens, starts[order, dims], np.roll(end, 1))
    wrong = (begin != expected) | (closes & (end != stops[order, dims]))
    filled = (np.bincount(numbers, minlength=count) > 0) & (cut.sum(1) <= 1)
    filled[numbers[wrong]] = False
    return filled
