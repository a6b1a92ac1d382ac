"""What ranks write, as columns of numbers, and what all of it makes up.

A thousand ranks write millions of blocks. The one that commits holds none of them as an object:
each rank describes its blocks in columns, and these become the columns of the chunk table.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.planner import WriteItem

from sharded_ema.checkpoint.dtypes import safetensors_name
from sharded_ema.checkpoint.reading.chunks import DIGEST_BYTES, Columns
from sharded_ema.checkpoint.reading.coverage import Coverage, Flags, Integers
from sharded_ema.checkpoint.reading.manifest import TensorRecord
from sharded_ema.checkpoint.safetensors import ITEMSIZE
from sharded_ema.errors import CheckpointWriteError
from sharded_ema.model.layout import Box, Shape

# Of the blocks of a save that are checked at a time.
_BATCH_ROWS = 1 << 15


def in_order(items: Sequence[WriteItem]) -> list[WriteItem]:
    """The items with elements, in the order in which they lie in a file.

    Back to back without holes, as safetensors wants it; wider types first keeps all aligned.
    """
    filled = (item for item in items if item.tensor_data and item.tensor_data.chunk.sizes.numel())
    return sorted(filled, key=_negative_itemsize)


def _negative_itemsize(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return -item.tensor_data.properties.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Rows:
    """The blocks that one rank writes, or could write, in the order in which they lie in its file.

    Attributes:
        keys, shapes, dtypes: of their tensors, and of those without elements.
        tensor: ``[n]``, positions in ``keys``.
        offsets, sizes: ``[n, dimensions]``, in elements; beyond a tensor's dimensions 0 and 1.
    """

    keys: list[str]
    shapes: list[Shape]
    dtypes: list[str]
    tensor: Integers
    offsets: Integers
    sizes: Integers

    @classmethod
    def of(cls, items: Sequence[WriteItem]) -> Rows:
        """Describe the items of a plan.

        Raises:
            CheckpointWriteError: safetensors has no name for a dtype.
        """
        described: dict[str, tuple[Shape, str]] = {}
        for item in items:
            key, data = item.index.fqn, item.tensor_data
            assert data is not None
            if key not in described:
                dtype = safetensors_name(data.properties.dtype, key)
                described[key] = (tuple(data.size), dtype)
        number = {key: i for i, key in enumerate(described)}
        blocks = [(item.index.fqn, item.tensor_data) for item in in_order(items)]
        width = max([1, *(len(shape) for shape, _ in described.values())])
        offsets = np.zeros((len(blocks), width), np.int64)
        sizes = np.ones((len(blocks), width), np.int64)
        for row, (_, data) in enumerate(blocks):
            assert data is not None
            offsets[row, : len(data.size)] = data.chunk.offsets
            sizes[row, : len(data.size)] = data.chunk.sizes
        return cls(
            list(described),
            [shape for shape, _ in described.values()],
            [dtype for _, dtype in described.values()],
            np.array([number[key] for key, _ in blocks], np.int64),
            offsets,
            sizes,
        )

    def pack(self) -> bytes:
        """All of it in few bytes, as one rank sends it to another."""
        texts = json.dumps([self.keys, self.shapes, self.dtypes, self.sizes.shape])
        numbers = (self.tensor, self.offsets, self.sizes)
        parts = [texts.encode(), b"\n", *(part.tobytes() for part in numbers)]
        return zlib.compress(b"".join(parts), 1)

    @classmethod
    def unpack(cls, data: bytes) -> Rows:
        """What :meth:`pack` has made of it on another rank."""
        texts, _, rest = zlib.decompress(data).partition(b"\n")
        keys, shapes, dtypes, (count, width) = json.loads(texts)
        numbers = np.frombuffer(rest, np.int64)
        tensor, offsets, sizes = np.split(numbers, [count, count + count * width])
        shape = (count, width)
        return cls(
            keys, list(map(tuple, shapes)), dtypes,
            tensor, offsets.reshape(shape), sizes.reshape(shape),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Geometry:
    """Which blocks make up the tensors of a save, and who writes them: all but their data.

    Attributes:
        tensors: sorted by key.
        counts: ``[ranks]``, blocks that each rank writes.
        kept: by rank, which of the blocks that it described it writes; ``None`` for all.
        place: ``[n]``; the place of each row of the chunk table among the blocks of all ranks, one
            rank after the other, as they lie in the files.
        offsets, sizes: ``[n, dimensions]``, of the rows of the chunk table.
    """

    tensors: tuple[TensorRecord, ...]
    counts: Integers
    kept: list[Flags | None]
    place: Integers
    offsets: Integers
    sizes: Integers

    @classmethod
    def of(cls, ranks: Iterable[Rows]) -> Geometry:
        """Put together what the ranks can write; of equal blocks one of them keeps each.

        Raises:
            CheckpointWriteError: the blocks do not fill their tensors.
        """
        described, parts = _gather(ranks)
        held = np.array([len(tensor) for tensor, _, _ in parts], np.int64)
        width = max([1, *(offsets.shape[1] for _, offsets, _ in parts)])
        keys = sorted(described)
        rank_in_keys = np.empty(len(keys), np.int32)
        rank_in_keys[[described[key][0] for key in keys]] = np.arange(len(keys), dtype=np.int32)
        tensor = rank_in_keys[np.concatenate([p[0] for p in parts] or [np.zeros(0, np.int32)])]
        offsets = np.concatenate([_widen(p[1], width, 0) for p in parts] or [_none(width)])
        sizes = np.concatenate([_widen(p[2], width, 1) for p in parts] or [_none(width)])
        del parts
        order = np.lexsort((*offsets.T[::-1], tensor))
        tensor, offsets, sizes = tensor[order], offsets[order], sizes[order]
        itemsize = np.array([ITEMSIZE[described[key][2]] for key in keys], np.int64)
        stays = _without_copies(tensor, offsets, sizes, order, held, itemsize)
        kept: list[Flags | None] = [None] * len(held)
        counts = held
        if stays is not None:
            of_all = np.empty(len(order), np.bool_)
            of_all[order] = stays
            per_rank = np.split(of_all, np.cumsum(held)[:-1])
            kept = [None if flags.all() else flags for flags in per_rank]
            counts = np.array([flags.sum() for flags in per_rank], np.int64)
            order = (np.cumsum(of_all) - 1)[order[stays]]
            tensor, offsets, sizes = tensor[stays], offsets[stays], sizes[stays]
        found = np.bincount(tensor, minlength=len(keys))
        records = tuple(
            TensorRecord(key, described[key][1], described[key][2], first, count)
            for key, first, count in zip(
                keys, (np.cumsum(found) - found).tolist(), found.tolist(), strict=True
            )
        )
        _check_coverage(records, tensor, offsets, sizes)
        return cls(records, counts, kept, _narrow(order), offsets, sizes)

    def columns(
        self, files: Sequence[int], starts: Sequence[int], digests: NDArray[np.uint8]
    ) -> Columns:
        """The chunk table.

        Args:
            files: by rank, the id of its file; any number of a rank that writes nothing.
            starts: by rank, the byte of its file at which the data begins.
            digests: ``[n, 16]``, of all blocks, one rank after the other.
        """
        rows = [record.num_chunks for record in self.tensors]
        itemsize = np.array([ITEMSIZE[record.dtype] for record in self.tensors], np.int64)
        num_bytes = np.multiply.reduce(self.sizes, axis=1, dtype=np.int64)
        num_bytes *= np.repeat(itemsize, rows)
        in_files = np.empty_like(num_bytes)
        in_files[self.place] = num_bytes
        before = np.cumsum(in_files) - in_files
        first = np.cumsum(self.counts) - self.counts
        of_rank = before[np.minimum(first, max(0, len(before) - 1))] if len(before) else first
        before += np.repeat(np.array(starts, np.int64) - of_rank, self.counts)
        return {
            "tensor": np.repeat(np.arange(len(rows), dtype=np.int32), rows),
            "offsets": self.offsets,
            "sizes": self.sizes,
            "file": np.repeat(np.array(files, np.int32), self.counts)[self.place],
            "byte_offset": before[self.place],
            "num_bytes": num_bytes,
            "digest": digests.reshape(-1, DIGEST_BYTES)[self.place],
        }


_Part = tuple[NDArray[np.int32], Integers, Integers]


def _gather(ranks: Iterable[Rows]) -> tuple[dict[str, tuple[int, Shape, str]], list[_Part]]:
    """Number, shape and dtype of each tensor by key; per rank numbers, offsets and sizes."""
    described: dict[str, tuple[int, Shape, str]] = {}
    parts = []
    for rank, rows in enumerate(ranks):
        numbers = np.empty(len(rows.keys), np.int32)
        for i, (key, shape, dtype) in enumerate(
            zip(rows.keys, rows.shapes, rows.dtypes, strict=True)
        ):
            known = described.get(key)
            if known is None:
                known = described[key] = (len(described), shape, dtype)
            elif known[1] != shape or known[2] != dtype:
                raise CheckpointWriteError(
                    f"{key} is {dtype} of shape {shape} on rank {rank} and {known[2]} of shape "
                    f"{known[1]} on a rank before it; nothing was committed"
                )
            numbers[i] = known[0]
        parts.append((numbers[rows.tensor], _narrow(rows.offsets), _narrow(rows.sizes)))
    return described, parts


def _narrow(numbers: Integers) -> Integers:
    """The same in half the memory, if they fit; they are kept from one save to the next."""
    fits = not numbers.size or int(numbers.max()) < 1 << 31
    return numbers.astype(np.int32) if fits else numbers


def _widen(numbers: Integers, width: int, by: int) -> Integers:
    missing = width - numbers.shape[1]
    return np.pad(numbers, ((0, 0), (0, missing)), constant_values=by) if missing else numbers


def _none(width: int) -> Integers:
    return np.zeros((0, width), np.int64)


def _without_copies(
    tensor: NDArray[np.int32],
    offsets: Integers,
    sizes: Integers,
    order: Integers,
    held: Integers,
    itemsize: Integers,
) -> Flags | None:
    """Which rows stay if each block is written once; ``None`` for all of them.

    Of the ranks that hold it, the one that has least to write so far writes a block.

    Args:
        tensor, offsets, sizes: of the rows, sorted.
        order: place of each row among those of all ranks, one rank after the other.
        held: rows by rank.
        itemsize: by tensor.
    """
    again = np.zeros(len(tensor), np.bool_)
    again[1:] = (tensor[1:] == tensor[:-1]) & (offsets[1:] == offsets[:-1]).all(axis=1)
    if not again.any():
        return None
    rank = np.repeat(np.arange(len(held)), held)[order]
    num_bytes = np.multiply.reduce(sizes, axis=1, dtype=np.int64) * itemsize[tensor]
    firsts = np.flatnonzero(~again)
    lengths = np.diff(firsts, append=len(tensor))
    stays = np.zeros(len(tensor), np.bool_)
    alone = firsts[lengths == 1]
    stays[alone] = True
    load = np.bincount(rank[alone], num_bytes[alone], len(held)).astype(np.int64).tolist()
    several = lengths > 1
    for first, length in zip(firsts[several].tolist(), lengths[several].tolist(), strict=True):
        rows = range(first, first + length)
        chosen = min(rows, key=lambda row: load[rank[row]])
        stays[chosen] = True
        load[rank[chosen]] += int(num_bytes[chosen])
    return stays


def _check_coverage(
    records: Sequence[TensorRecord], tensor: NDArray[np.int32], offsets: Integers, sizes: Integers
) -> None:
    """Refuse to save tensors with holes, or with elements that are written twice."""
    shapes, dtypes = [record.shape for record in records], [record.dtype for record in records]
    coverage = Coverage(shapes, dtypes, offsets.shape[1])
    for first in range(0, len(tensor), _BATCH_ROWS):
        batch = slice(first, first + _BATCH_ROWS)
        columns = (tensor[batch], offsets[batch], sizes[batch])
        coverage.add(*(column.astype(np.int64) for column in columns))
    for number in coverage.faulty()[:1].tolist():
        record = records[number]
        dims, rows = len(record.shape), slice(record.first_chunk, None)
        boxes = [
            Box(tuple(start[:dims]), tuple(size[:dims]))
            for start, size in zip(
                offsets[rows][: record.num_chunks].tolist(),
                sizes[rows][: record.num_chunks].tolist(),
                strict=True,
            )
        ]
        volume = sum(box.numel for box in boxes)
        outside = [box for box in boxes if not box.fits(record.shape)]
        raise CheckpointWriteError(
            f"{record.key}: the ranks would write {volume} of {Box.whole(record.shape).numel} "
            f"elements, in blocks that leave holes or overlap"
            f"{f', {outside[0]} lies outside' if outside else ''}; nothing was committed"
        )
