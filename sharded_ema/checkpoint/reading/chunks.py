"""The chunk table: where each block of each tensor lies, as columns in a safetensors file.

Columns rather than JSON, so that the table of a thousand ranks is read by slices and never parsed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from sharded_ema.checkpoint.reading.safetensors_file import build_header, read_header
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.layout import Box, Shape

_COLUMNS = ("tensor", "offsets", "sizes", "file", "byte_offset", "num_bytes")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored block of a tensor.

    Attributes:
        box: the block in the global tensor.
        file: name of the file.
        byte_offset, num_bytes: where in the file.
        digest: xxh3-128 of the bytes, if known.
        crc32: CRC-32 of the bytes, if known (foreign checkpoints).
        strides: in elements, if the block is not stored in C order (foreign checkpoints).
    """

    box: Box
    file: str
    byte_offset: int
    num_bytes: int
    digest: bytes | None = None
    crc32: int | None = None
    strides: Shape | None = None


def write_chunk_table(
    rows: Sequence[tuple[int, Chunk]], file_ids: dict[str, int], uuid: str
) -> bytes:
    """The table as a whole file.

    Args:
        rows: tensor id and chunk, sorted by tensor id and offsets.
        file_ids: position of each file in the manifest.
    """
    depth = max([1, *(len(chunk.box.sizes) for _, chunk in rows)])

    def padded(values: Shape, fill: int) -> list[int]:
        return [*values, *[fill] * (depth - len(values))]

    columns = {
        "tensor": [t for t, _ in rows],
        "offsets": [padded(c.box.offsets, 0) for _, c in rows],
        "sizes": [padded(c.box.sizes, 1) for _, c in rows],
        "file": [file_ids[c.file] for _, c in rows],
        "byte_offset": [c.byte_offset for _, c in rows],
        "num_bytes": [c.num_bytes for _, c in rows],
    }
    wide = {"offsets": (len(rows), depth), "sizes": (len(rows), depth)}
    arrays = {
        name: numpy.array(values, dtype="<i8").reshape(wide.get(name, (len(rows),)))
        for name, values in columns.items()
    }
    digests = b"".join(chunk.digest or bytes(16) for _, chunk in rows)
    described = [(name, "I64", tuple(array.shape)) for name, array in arrays.items()]
    header, _ = build_header([*described, ("digest", "U8", (len(rows), 16))], {"uuid": uuid})
    return header + b"".join(a.tobytes() for a in arrays.values()) + digests


class ChunkTable:
    """An open chunk table.

    Args:
        path: the file.
        uuid: that it must carry.
        files: names by file id.

    Raises:
        CheckpointCorruptError: columns are missing or of another kind, or the uuid differs.
    """

    def __init__(self, path: Path, uuid: str, files: Sequence[str]) -> None:
        self._path, self._files = path, files
        self._entries, metadata, self._start = read_header(path)
        missing = {*_COLUMNS, "digest"} - self._entries.keys()
        if missing or metadata.get("uuid") != uuid:
            raise CheckpointCorruptError(f"{path} belongs to another save, or lacks {missing}")
        self.num_rows = self._entries["tensor"].shape[0]

    def rows(self, first: int, count: int, ndim: int) -> list[Chunk]:
        """Chunks ``first`` to ``first + count``, of a tensor of ``ndim`` dimensions."""
        if not 0 <= first <= first + count <= self.num_rows:
            raise CheckpointCorruptError(f"{self._path}: no rows {first}:{first + count}")
        with open(self._path, "rb") as file:
            descriptor = file.fileno()
            column = {name: self._column(descriptor, name, first, count) for name in _COLUMNS}
            digests = self._column(descriptor, "digest", first, count)
        chunks = []
        for i in range(count):
            offsets = tuple(int(n) for n in column["offsets"][i][:ndim])
            sizes = tuple(int(n) for n in column["sizes"][i][:ndim])
            file_id = int(column["file"][i])
            if min((*offsets, *sizes, file_id), default=0) < 0 or file_id >= len(self._files):
                raise CheckpointCorruptError(f"{self._path}: row {first + i} is out of range")
            chunks.append(
                Chunk(
                    Box(offsets, sizes),
                    self._files[file_id],
                    int(column["byte_offset"][i]),
                    int(column["num_bytes"][i]),
                    digests[i].tobytes(),
                )
            )
        return chunks

    def _column(self, descriptor: int, name: str, first: int, count: int) -> numpy.ndarray:
        entry = self._entries[name]
        dtype = numpy.dtype("u1" if entry.dtype == "U8" else "<i8")
        row = math.prod(entry.shape[1:]) * dtype.itemsize
        data = os.pread(descriptor, count * row, self._start + entry.start + first * row)
        return numpy.frombuffer(data, dtype).reshape(count, *entry.shape[1:])
