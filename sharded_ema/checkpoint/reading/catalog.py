"""Opens a checkpoint of any kind and says what is in it; reads no tensor data."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from sharded_ema.checkpoint.reading.chunks import Chunk, ChunkTable
from sharded_ema.checkpoint.reading.dcp import METADATA_NAME, StockCheckpoint
from sharded_ema.checkpoint.reading.manifest import (
    CHUNKS_NAME,
    MANIFEST_NAME,
    Manifest,
    decode_meta,
    parse_manifest,
)
from sharded_ema.checkpoint.reading.safetensors_file import ITEMSIZE, read_header
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES, blocks
from sharded_ema.config import META_BYTES, META_KEY
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
)
from sharded_ema.layout import Box, Shape


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Name, global shape and safetensors dtype of a stored tensor."""

    key: str
    shape: Shape
    dtype: str


class Catalog:
    """An open checkpoint.

    Attributes:
        path: its directory.
        format: ``"safetensors"``, or ``"dcp"``.
        manifest: ``None`` for a checkpoint that other software wrote.
        tensors: by key.
    """

    def __init__(self, path: Path, manifest: Manifest | None) -> None:
        self.path = path
        self.manifest = manifest
        self.format = manifest.format if manifest else "dcp"
        self._stock: StockCheckpoint | None = None
        self._table: ChunkTable | None = None
        if self.format == "safetensors":
            assert manifest is not None
            names = [file.name for file in manifest.files]
            self._table = ChunkTable(path / CHUNKS_NAME, manifest.uuid, names)
            self._rows = {t.key: (t.first_chunk, t.num_chunks) for t in manifest.tensors}
            self.tensors = {t.key: StoredTensor(t.key, t.shape, t.dtype) for t in manifest.tensors}
        else:
            self._stock = StockCheckpoint(path)
            self.tensors = {
                key: StoredTensor(key, shape, dtype)
                for key, (shape, dtype) in self._stock.tensors.items()
            }
        self._sizes: dict[str, int] = {}

    @property
    def verified_metadata(self) -> bool:
        """Whether names, shapes and places are under a digest, too."""
        return self.manifest is not None

    def chunks(self, key: str) -> list[Chunk]:
        """The blocks of a tensor, checked to lie in files and to cover it exactly once.

        Raises:
            CheckpointCorruptError: they do not.
        """
        tensor = self.tensors[key]
        if self._table is not None:
            found = self._table.rows(*self._rows[key], len(tensor.shape))
        else:
            assert self._stock is not None
            found = self._stock.chunks(key)
        itemsize = ITEMSIZE[tensor.dtype]
        for chunk in found:
            size = self._file_size(chunk.file)
            if (
                not chunk.box.fits(tensor.shape)
                or not 0 <= chunk.byte_offset <= chunk.byte_offset + chunk.num_bytes <= size
                or (chunk.strides is None and chunk.num_bytes != chunk.box.numel * itemsize)
            ):
                raise CheckpointCorruptError(
                    f"{key}: {chunk.box} in bytes {chunk.byte_offset}+{chunk.num_bytes} of "
                    f"{chunk.file} ({size} bytes) does not fit a tensor of {tensor.shape}"
                )
        _check_cover(key, tensor.shape, [chunk.box for chunk in found])
        return found

    def _file_size(self, name: str) -> int:
        if name not in self._sizes:
            self._sizes[name] = regular_file_size(self.path, name)
        return self._sizes[name]

    def prefixes(self) -> list[str]:
        """Key prefixes under which an average of this library lies; ``""`` if not nested."""
        return sorted(k.removesuffix(META_KEY) for k in self.tensors if is_meta(k))

    def meta(self, prefix: str = "") -> dict[str, Any]:
        """What the average under ``prefix`` says of itself.

        Raises:
            CheckpointCorruptError: unreadable.
        """
        key = prefix + META_KEY
        (chunk,) = self.chunks(key)
        if chunk.num_bytes > META_BYTES:
            raise CheckpointCorruptError(f"{key} is {chunk.num_bytes} bytes, more than {META_BYTES}")
        return decode_meta(b"".join(bytes(b) for b in blocks(self.path, chunk)), key)


def is_meta(key: str) -> bool:
    """Whether a key is that of an average's description."""
    return key == META_KEY or key.endswith(f".{META_KEY}")


def open_checkpoint(path: str | os.PathLike[str]) -> Catalog:
    """Open a committed checkpoint.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointUncommittedError: a save was begun and never finished.
        CheckpointCorruptError: files are missing, changed, too many, or not what they claim.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"there is no checkpoint at {folder}")
    names = {entry.name for entry in os.scandir(folder)}
    if ".tmp-" in folder.name:
        raise CheckpointUncommittedError(f"{folder} is a save that never finished; do not use it")
    if MANIFEST_NAME in names:
        if regular_file_size(folder, MANIFEST_NAME) > 1 << 30:
            raise CheckpointCorruptError(f"{folder / MANIFEST_NAME} is larger than 1 GiB")
        where = str(folder / MANIFEST_NAME)
        manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes(), where)
        _check_files(folder, manifest, names)
        return Catalog(folder, manifest)
    if METADATA_NAME in names:
        regular_file_size(folder, METADATA_NAME)
        return Catalog(folder, None)
    if any(name.endswith((".safetensors", ".distcp")) for name in names):
        raise CheckpointUncommittedError(
            f"{folder} holds shards but neither {MANIFEST_NAME} nor {METADATA_NAME}: it was never "
            "committed, or is no sharded checkpoint"
        )
    raise CheckpointNotFoundError(f"{folder} holds no checkpoint")


def regular_file_size(folder: Path, name: str) -> int:
    """Size of a file of the directory.

    Raises:
        CheckpointCorruptError: it is missing, is a link or lies elsewhere.
    """
    path = folder / name
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise CheckpointCorruptError(f"{path} is missing, or not a regular file of the checkpoint")
    return path.stat().st_size


def _check_files(folder: Path, manifest: Manifest, names: set[str]) -> None:
    listed = {record.name for record in manifest.files}
    strange = sorted(names - listed - {MANIFEST_NAME})
    if strange or len(listed) != len(manifest.files):
        raise CheckpointCorruptError(f"{folder} holds files that its manifest does not list: {strange}")
    for record in manifest.files:
        size = regular_file_size(folder, record.name)
        if size != record.num_bytes or record.header_bytes > size:
            raise CheckpointCorruptError(
                f"{folder / record.name} has {size} bytes, {record.num_bytes} were written"
            )
        if record.name in (CHUNKS_NAME, METADATA_NAME):
            _check_digest(folder / record.name, size, record.digest)
        elif record.header_bytes:
            _check_digest(folder / record.name, record.header_bytes, record.header_digest)
            _, metadata, start = read_header(folder / record.name)
            if metadata.get("uuid") != manifest.uuid or start != record.header_bytes:
                raise CheckpointCorruptError(f"{folder / record.name} belongs to another save")


def _check_digest(path: Path, num_bytes: int, expected: str) -> None:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while num_bytes and (block := file.read(min(num_bytes, BLOCK_BYTES))):
            digest.update(block)
            num_bytes -= len(block)
    if digest.hexdigest() != expected:
        raise CheckpointCorruptError(f"{path} is not what was written (checksum mismatch)")


def _check_cover(key: str, shape: Shape, boxes: list[Box]) -> None:
    """Equal volume and pairwise disjoint; a sweep along one dimension keeps that cheap."""
    volume = sum(box.numel for box in boxes)
    if volume != math.prod(shape):
        raise CheckpointCorruptError(f"{key}: its blocks hold {volume} of {math.prod(shape)} elements")
    if not shape:
        return
    dim = max(range(len(shape)), key=lambda d: len({box.offsets[d] for box in boxes}))
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offsets[dim]):
        open_boxes = [b for b in open_boxes if b.offsets[dim] + b.sizes[dim] > box.offsets[dim]]
        clash = next((b for b in open_boxes if b.overlaps(box)), None)
        if clash is not None:
            raise CheckpointCorruptError(f"{key}: the blocks {clash} and {box} overlap")
        open_boxes.append(box)
