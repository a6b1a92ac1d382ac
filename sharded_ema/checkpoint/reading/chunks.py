"""Chunks: which block of which tensor lies where; and the table of them in this library's format.

The table is columns of a safetensors file. A manifest with a JSON object per chunk would take
hundreds of megabytes to parse at a thousand ranks; columns are read a few rows at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint.files import Directory, OpenFile
from sharded_ema.checkpoint.names import CHUNKS_NAME
from sharded_ema.checkpoint.reading.coverage import Coverage, Integers
from sharded_ema.checkpoint.reading.manifest import Manifest, TensorRecord
from sharded_ema.checkpoint.safetensors import Entry, build_header, parse_header
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Box, Shape

DIGEST_BYTES = 16
# Of one tensor: more than any number of ranks makes, and what can be held in memory.
_MAX_ROWS = 1 << 20
# Some 6 MB of a table of three dimensions, and as much again for what is compared.
_SLAB_ROWS = 1 << 16
# Boxes cut in many dimensions have many corners; about five seconds' worth.
_MAX_CORNERS = 1 << 22
_COLUMNS = ("tensor", "offsets", "sizes", "file", "byte_offset", "num_bytes", "digest")

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored block of a tensor.

    Attributes:
        box: which elements of the global tensor.
        file: name of the file inside the checkpoint's directory.
        byte_offset: position of the first byte in the file.
        num_bytes: length of the data.
        digest: xxh3-128 of the data, ``None`` in DCP files.
        crc32: CRC32 of the data in DCP files, if they have one.
        strides: in elements, if the block is not stored in C order.
    """

    box: Box
    file: str
    byte_offset: int
    num_bytes: int
    digest: bytes | None
    crc32: int | None = None
    strides: Shape | None = None


class Index(Protocol):
    """Where the tensors of a checkpoint lie: all that a format has to say.

    A further format is a further index, and a branch where checkpoints are opened
    (:mod:`sharded_ema.tools.source`).
    """

    @property
    def format(self) -> str:
        """What reports call the format."""
        ...

    @property
    def tensors(self) -> Mapping[str, tuple[Shape, str]]:
        """Global shape, and safetensors name of the dtype, by key."""
        ...

    @property
    def unsupported(self) -> Mapping[str, tuple[Shape, str]]:
        """Global shape, and what the dtype is called, by key of tensors that are not read here."""
        ...

    def chunks(self, key: str) -> list[Chunk]:
        """Where a tensor's data lies; whether the blocks fill it is not checked here.

        Raises:
            CheckpointCorruptError: a block cannot lie where it should.
        """
        ...


@dataclass(frozen=True, slots=True)
class KnownChunks:
    """The index of a format in which opening a checkpoint tells where everything lies.

    Attributes:
        format, tensors, unsupported: see :class:`Index`.
        places: the chunks by key.
        texts: what the files say of their tensors, such as that they are an average.
    """

    format: str
    tensors: Mapping[str, tuple[Shape, str]]
    places: Mapping[str, list[Chunk]]
    texts: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, tuple[Shape, str]] = field(default_factory=dict)

    def chunks(self, key: str) -> list[Chunk]:
        """See :class:`Index`."""
        return self.places[key]


# ---------------------------------------------------------------------- the table


def dump_chunk_table(columns: Columns, uuid: str) -> Iterator[memoryview]:
    """The bytes of ``chunks.safetensors``, piece by piece.

    Args:
        columns: by name, ``[n, ...]``; rows sorted by tensor id, then by the offsets of the block.
            Integers may be of any width.
        uuid: of the save.
    """
    yield memoryview(_table_header(columns, uuid)[0])
    for name in _COLUMNS:
        dtype = "u1" if name == "digest" else "<i8"
        for first in range(0, len(columns[name]), _SLAB_ROWS):
            rows = columns[name][first : first + _SLAB_ROWS]
            yield np.ascontiguousarray(rows, dtype).reshape(-1).view(np.uint8).data


def chunk_table_bytes(columns: Columns, uuid: str) -> int:
    """How many they are."""
    header, entries = _table_header(columns, uuid)
    return len(header) + entries[-1].stop


def _table_header(columns: Columns, uuid: str) -> tuple[bytes, list[Entry]]:
    tensors = [
        (name, "U8" if name == "digest" else "I64", columns[name].shape) for name in _COLUMNS
    ]
    return build_header(tensors, {"format": "pt", "uuid": uuid}, align=8)


class ChunkTable:
    """``chunks.safetensors``, of which only the rows asked for are read.

    Args:
        directory: where it lies; its digest has been checked by the caller.
        files: names by file id.
        name: of the table.

    Attributes:
        uuid: of the save that wrote it.
        num_rows: number of chunks.
        width: dimensions that a row has room for.
        header_bytes: where its columns begin.

    Raises:
        CheckpointCorruptError: it has not the columns that it should have.
    """

    def __init__(self, directory: Directory, files: Sequence[str], name: str = CHUNKS_NAME) -> None:
        self._directory = directory
        self._name = name
        self._path = path = directory.location / name
        self._files = files
        with directory.open(name) as file:
            self._entries, metadata, self.header_bytes = parse_header(file)
        self.uuid = metadata.get("uuid", "")
        entry = self._entries.get("offsets", Entry("", "", (), 0, 0))
        if len(entry.shape) != 2 or entry.shape[1] < 1:
            raise CheckpointCorruptError(f"{path} has no column of offsets")
        self.num_rows, self.width = entry.shape
        shapes: dict[str, Shape] = dict.fromkeys(_COLUMNS, (self.num_rows,))
        shapes |= {"offsets": entry.shape, "sizes": entry.shape}
        shapes["digest"] = (self.num_rows, DIGEST_BYTES)
        for name, shape in shapes.items():
            found = self._entries.get(name)
            dtype = "U8" if name == "digest" else "I64"
            if found is None or found.shape != shape or found.dtype != dtype:
                raise CheckpointCorruptError(f"{path} has no column {name!r} of shape {shape}")

    def rows(self, first: int, count: int, *, tensor: int, ndim: int) -> list[Chunk]:
        """The chunks of one tensor.

        Args:
            first, count: rows, as the manifest gives them.
            tensor: id that these rows must carry.
            ndim: number of dimensions of the tensor.

        Raises:
            CheckpointCorruptError: rows that are not there, or of another tensor, or impossible.
        """
        if first + count > self.num_rows or ndim > self.width or count > _MAX_ROWS:
            raise CheckpointCorruptError(
                f"{self._path} has {self.num_rows} rows of {self.width} dimensions, the manifest "
                f"asks for rows {first} to {first + count} of {ndim}"
            )
        found = self.records(first, count)
        self.check(found, np.full(count, ndim))
        if (found["tensor"] != tensor).any():
            raise CheckpointCorruptError(f"{self._path}: rows {first} and on name another tensor")
        return self.chunks(found, [ndim] * count)

    def check(self, records: NDArray[np.void], ndims: NDArray[np.int64]) -> None:
        """Whether rows can be true.

        Args:
            records: what :meth:`records` has returned, or some of it.
            ndims: number of dimensions of the tensor of each.

        Raises:
            CheckpointCorruptError: they cannot.
        """
        beyond = np.arange(self.width) >= ndims[:, None]
        padding = beyond & ((records["offsets"] != 0) | (records["sizes"] != 1))
        negative = any((records[name] < 0).any() for name in _COLUMNS if name != "digest")
        if padding.any() or negative:
            raise CheckpointCorruptError(f"{self._path} has malformed rows")
        if (records["file"] >= len(self._files)).any():
            raise CheckpointCorruptError(f"{self._path} has rows that name an unknown file")

    def chunks(self, records: NDArray[np.void], ndims: Sequence[int]) -> list[Chunk]:
        """What checked rows say, an object each; arguments as of :meth:`check`."""
        columns = [records[name].tolist() for name in _COLUMNS if name not in ("tensor", "digest")]
        digests = records["digest"].tobytes()
        return [
            Chunk(
                box=Box(tuple(offsets[:ndim]), tuple(sizes[:ndim])),
                file=self._files[file],
                byte_offset=byte_offset,
                num_bytes=num_bytes,
                digest=digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES],
            )
            for i, (ndim, offsets, sizes, file, byte_offset, num_bytes) in enumerate(
                zip(ndims, *columns, strict=True)
            )
        ]

    def batches(self) -> Iterator[tuple[int, dict[str, Integers]]]:
        """All columns but the digests, some rows at a time, each time with the first row."""
        names = [name for name in _COLUMNS if name != "digest"]
        with self._directory.open(self._name) as file:
            for first, count in self.slabs():
                columns = ((name, self._read(file, name, first, count)) for name in names)
                yield first, {name: column.view(np.int64) for name, column in columns}

    @property
    def row_type(self) -> np.dtype[np.void]:
        """A row as :meth:`records` gives it: a field per column."""
        widths = {"offsets": (self.width,), "sizes": (self.width,), "digest": (DIGEST_BYTES,)}
        return np.dtype(
            [(name, "u1" if name == "digest" else "<i8", widths.get(name, ())) for name in _COLUMNS]
        )

    def slabs(self) -> Iterator[tuple[int, int]]:
        """First row and number of rows of the parts that the table is gone through in."""
        for first in range(0, self.num_rows, _SLAB_ROWS):
            yield first, min(_SLAB_ROWS, self.num_rows - first)

    def records(self, first: int, count: int) -> NDArray[np.void]:
        """Rows as they lie in the table, unchecked: ``(count,)`` of :attr:`row_type`."""
        found = np.empty(count, self.row_type)
        with self._directory.open(self._name) as file:
            for name in _COLUMNS:
                found[name] = self._read(file, name, first, count)
        return found

    def places(self) -> dict[str, NDArray[np.int64] | NDArray[np.uint8]]:
        """The columns ``tensor``, ``file``, ``byte_offset``, ``num_bytes`` and ``digest``, whole.

        Unchecked; 48 bytes a row.
        """
        names = ("tensor", "file", "byte_offset", "num_bytes", "digest")
        with self._directory.open(self._name) as file:
            return {name: self._read(file, name, 0, self.num_rows) for name in names}

    def _read(
        self, file: OpenFile, name: str, first: int, count: int
    ) -> NDArray[np.int64] | NDArray[np.uint8]:
        entry = self._entries[name]
        row_shape = entry.shape[1:]
        dtype: type[np.uint8] | type[np.int64] = np.uint8 if entry.dtype == "U8" else np.int64
        row_bytes = math.prod(row_shape) * np.dtype(dtype).itemsize
        position = self.header_bytes + entry.start + first * row_bytes
        data = np.empty(count * row_bytes, np.uint8)
        file.fill(data.data, position)
        return data.view(np.dtype(dtype).newbyteorder("<")).reshape(count, *row_shape)


class TableIndex:
    """The :class:`Index` of this library's own format: the manifest's tensors, the table's chunks.

    Args:
        directory: of the checkpoint.
        manifest: of the format ``"safetensors"``; its files have been checked by the caller.

    Attributes:
        table: the chunk table.

    Raises:
        CheckpointCorruptError: the table is missing, malformed, or of another save.
    """

    format = "safetensors"
    unsupported: Mapping[str, tuple[Shape, str]] = {}

    def __init__(self, directory: Directory, manifest: Manifest) -> None:
        self._path = directory.location
        self._files = {file.name: file for file in manifest.files}
        name = manifest.chunks_name
        if name not in self._files:
            raise CheckpointCorruptError(f"the manifest of {self._path} lists no {name}")
        self.table = ChunkTable(directory, list(self._files), name)
        rows = sum(t.num_chunks for t in manifest.tensors)
        if self.table.uuid != manifest.uuid or self.table.num_rows != rows:
            raise CheckpointCorruptError(f"{self._path / name} belongs to another save")
        self._records = {record.key: (i, record) for i, record in enumerate(manifest.tensors)}

    @property
    def tensors(self) -> Mapping[str, tuple[Shape, str]]:
        """See :class:`Index`."""
        return {key: (record.shape, record.dtype) for key, (_, record) in self._records.items()}

    def survey(self) -> tuple[list[TensorRecord], Coverage]:
        """Look at all rows of the table.

        Returns:
            The tensors, and what their blocks say of them. What :meth:`chunks` or
            :meth:`.opened.StoredTensor.chunks` would refuse is among the faulty ones.
        """
        records = [record for _, record in self._records.values()]
        coverage = Coverage(
            [record.shape for record in records],
            [record.dtype for record in records],
            self.table.width,
        )
        numbers = [(record.first_chunk, record.num_chunks) for record in records]
        firsts, counts = np.array(numbers, np.int64).reshape(-1, 2).T
        if (firsts != np.cumsum(counts) - counts).any():  # so no save has written it
            coverage.refuse(np.ones(len(records), np.bool_))
            return records, coverage
        files = list(self._files.values())
        beyond = 1 << 62  # of any file; where the data of one without a header would begin
        starts = np.array([min(file.header_bytes or beyond, beyond) for file in files], np.int64)
        stops = np.array([min(file.num_bytes, beyond) for file in files], np.int64)
        expected = np.repeat(np.arange(len(records), dtype=np.int32), counts)
        for first, columns in self.table.batches():
            tensor = expected[first : first + len(columns["tensor"])].astype(np.int64)
            num_bytes = coverage.add(tensor, columns["offsets"], columns["sizes"])
            file, place = columns["file"], columns["byte_offset"]
            wrong = (columns["tensor"] != tensor) | (columns["num_bytes"] != num_bytes)
            wrong |= (file < 0) | (file >= len(files))
            file = file.clip(0, len(files) - 1)
            wrong |= (place < starts[file]) | (place > stops[file] - num_bytes)
            coverage.refuse(tensor[wrong])
        return records, coverage

    def chunks(self, key: str) -> list[Chunk]:
        """See :class:`Index`."""
        number, record = self._records[key]
        chunks = self.table.rows(
            record.first_chunk, record.num_chunks, tensor=number, ndim=len(record.shape)
        )
        self.check_places(key, chunks)
        return chunks

    def check_places(self, key: str, chunks: Iterable[Chunk]) -> None:
        """Whether chunks of a tensor lie in the data of a shard.

        Raises:
            CheckpointCorruptError: one does not.
        """
        for chunk in chunks:
            file = self._files[chunk.file]
            stop = chunk.byte_offset + chunk.num_bytes
            if not file.header_bytes or not file.header_bytes <= chunk.byte_offset <= stop <= (
                file.num_bytes
            ):
                raise CheckpointCorruptError(
                    f"{self._path}: {key} should lie in bytes {chunk.byte_offset} to {stop} of "
                    f"{chunk.file}, which has {file.num_bytes}"
                )


def tiles(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether boxes fill a tensor of ``shape`` with neither hole nor overlap.

    Summing a box's corners with alternating signs is the mixed difference of its indicator
    function. The boxes' indicators add up to that of the whole tensor exactly when their signed
    corners do. This takes ``2 ** ndim`` steps per box, where comparing pairs is quadratic.

    Raises:
        CheckpointCorruptError: more blocks in more dimensions than can be checked.
    """
    boxes = [box for box in boxes if box.numel]
    whole = Box.whole(shape)
    if sum(box.numel for box in boxes) != whole.numel:
        return False
    # Dimensions in which nothing is cut say nothing and would double the corners.
    cut = [
        dim for dim, extent in enumerate(shape) if any(box.sizes[dim] != extent for box in boxes)
    ]
    if len(boxes) << len(cut) > _MAX_CORNERS:
        raise CheckpointCorruptError(
            f"a tensor of shape {tuple(shape)} lies in {len(boxes)} blocks cut in {len(cut)} "
            "dimensions, which no save does"
        )
    signed: Counter[Shape] = Counter()
    for sign, box in [*((1, box) for box in boxes), *([(-1, whole)] if whole.numel else [])]:
        ends = [((box.offsets[d], 1), (box.offsets[d] + box.sizes[d], -1)) for d in cut]
        for corner in product(*ends):
            signed[tuple(at for at, _ in corner)] += sign * math.prod(s for _, s in corner)
    return not any(signed.values())
