"""Opening a checkpoint: which tensors it holds and where their bytes are, checked before use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_ema.checkpoint.location import Location, as_location, entries, is_file
from sharded_ema.checkpoint.pointer import follow
from sharded_ema.checkpoint.reading.chunks import Chunk, ChunkTable, tiles
from sharded_ema.checkpoint.reading.dcp import METADATA_NAME, DcpIndex
from sharded_ema.checkpoint.reading.listed import check_file, check_listing, read_manifest
from sharded_ema.checkpoint.reading.manifest import (
    CHUNKS_NAME,
    MANIFEST_NAME,
    Manifest,
    check_meta,
    decode_meta,
)
from sharded_ema.checkpoint.reading.stream import (
    SourceFiles,
    stream_tensor,
    verify_chunk,
    verify_file,
)
from sharded_ema.checkpoint.safetensors import (
    ITEMSIZE,
)
from sharded_ema.config import BUFFERS_PREFIX, FROZEN_PREFIX, META_KEY
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
)
from sharded_ema.model.layout import Shape

_MAX_META_BYTES = 1 << 24
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f-]+$")
_PART = re.compile(r"shard-\d+\.safetensors|__\d+_\d+\.distcp|chunks\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint: key, global shape, and safetensors name of its dtype."""

    key: str
    shape: Shape
    dtype: str

    @property
    def num_bytes(self) -> int:
        numel = 1
        for extent in self.shape:
            numel *= extent
        return numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Catalog:
    """The contents of one committed checkpoint.

    Attributes:
        path: its directory.
        format: ``"safetensors"``, or ``"dcp"`` for torch's own.
        manifest: ``None`` for a DCP checkpoint that this library did not write.
        tensors: by key.
        unsupported: torch dtype by key of stored tensors that this library does not read.
        table: the chunk table of the format ``"safetensors"``.
        index: the metadata of the format ``"dcp"``.
    """

    path: Location
    format: str
    manifest: Manifest | None
    tensors: dict[str, StoredTensor]
    unsupported: dict[str, str]
    _locate: Callable[[str], list[Chunk]]
    table: ChunkTable | None = None
    index: DcpIndex | None = None

    @property
    def verified_metadata(self) -> bool:
        """Whether a digest covers what is said of the tensors, not only their data."""
        return self.manifest is not None

    @property
    def world_size(self) -> int | None:
        """Number of ranks that saved, if the checkpoint says so."""
        return self.manifest.world_size if self.manifest else None

    def chunks(self, key: str) -> list[Chunk]:
        """Where a tensor's data lies: blocks that fill it with neither hole nor overlap.

        Raises:
            CheckpointCorruptError: the blocks do not fit the tensor or the files.
        """
        tensor = self.tensors[key]
        chunks = self._locate(key)
        for chunk in chunks:
            if not chunk.box.fits(tensor.shape) or not chunk.box.numel:
                raise CheckpointCorruptError(
                    f"{self.path}: {key} has shape {tensor.shape} and a chunk at "
                    f"{chunk.box.offsets} of size {chunk.box.sizes}"
                )
            size = chunk.box.numel * ITEMSIZE[tensor.dtype]
            if chunk.num_bytes != size:
                raise CheckpointCorruptError(
                    f"{self.path}: {key} has a chunk of {chunk.num_bytes} bytes, {tensor.dtype} of "
                    f"shape {chunk.box.sizes} takes {size}"
                )
        if not tiles((chunk.box for chunk in chunks), tensor.shape):
            stored = sum(chunk.num_bytes for chunk in chunks)
            raise CheckpointCorruptError(
                f"{self.path}: the chunks of {key} leave holes or overlap: they hold {stored} of "
                f"{tensor.num_bytes} bytes"
            )
        return chunks

    def verify(self, chunks: Mapping[Chunk, str]) -> None:
        """Compare the data of chunks, given with the keys of their tensors, with their digests.

        Of this library's checkpoints in the format ``"dcp"`` the files that hold them are hashed
        whole: what an entry says of itself does not show that it belongs to this save.

        Raises:
            CheckpointCorruptError: it is not what was written.
            CheckpointMismatchError: a chunk carries no checksum.
        """
        if self.format == "dcp" and self.manifest is not None:
            needed = {chunk.file for chunk in chunks}
            for record in self.manifest.files:
                if record.name in needed:
                    verify_file(self.path / record.name, record.digest)
            return
        for chunk, key in chunks.items():
            if chunk.digest is None and chunk.crc32 is None:
                raise CheckpointMismatchError(
                    f"{key} in {self.path} was written without a CRC32, so it cannot be verified; "
                    "load it with verify=False if you trust it"
                )
            verify_chunk(self.path, chunk, key)

    def read_bytes(self, key: str) -> bytes:
        """All bytes of a small tensor in C order, checked.

        Raises:
            CheckpointCorruptError: they are not what was written.
        """
        tensor, chunks = self.tensors[key], self.chunks(key)
        with SourceFiles(self.path) as files:
            blocks = stream_tensor(files, key, tensor.shape, ITEMSIZE[tensor.dtype], chunks)
            return b"".join(block.tobytes() for block in blocks)

    def prefixes(self) -> list[str]:
        """The key prefixes under which averages of this library are stored, such as ``"ema."``."""
        if self.manifest is not None:
            return sorted(self.manifest.emas)
        return sorted(
            key.removesuffix(META_KEY)
            for key, tensor in self.tensors.items()
            if key.rpartition(".")[2] == META_KEY and (tensor.dtype, len(tensor.shape)) == ("U8", 1)
        )

    def meta(self, prefix: str = "") -> dict[str, Any]:
        """What the average under ``prefix`` says of itself.

        Raises:
            CheckpointMismatchError: there is no average under it.
            CheckpointCorruptError: its description is damaged.
        """
        if prefix not in self.prefixes():
            known = ", ".join(repr(p) for p in self.prefixes()) or "none"
            raise CheckpointMismatchError(
                f"{self.path} holds no average under the prefix {prefix!r}; it has: {known}"
            )
        if self.manifest is None:
            return self.stored_meta(prefix)
        meta = self.manifest.emas[prefix]
        check_meta(meta, f"{prefix}{META_KEY} in {self.path}")
        return meta

    def stored_meta(self, prefix: str) -> dict[str, Any]:
        """The same from the tensor ``_meta``, where a manifest would have it as well.

        Raises:
            CheckpointMismatchError, CheckpointCorruptError: see :meth:`meta`.
        """
        key = prefix + META_KEY
        if self.tensors[key].num_bytes > _MAX_META_BYTES:
            raise CheckpointCorruptError(
                f"{key} in {self.path} has {self.tensors[key].num_bytes} bytes, which no "
                "description takes"
            )
        return decode_meta(self.read_bytes(key), f"{key} in {self.path}")


def is_meta_key(key: str) -> bool:
    """Whether a key may be that of a description: a buffer may have the same last name."""
    inner = f".{key}"
    return inner.endswith(f".{META_KEY}") and not any(
        f".{part}" in inner for part in (BUFFERS_PREFIX, FROZEN_PREFIX)
    )


def find_checkpoint(path: str | os.PathLike[str]) -> tuple[Location, set[str]]:
    """The directory that holds a committed checkpoint, and the names in it.

    It is ``path`` itself, or what a file ``latest`` at ``path`` names, or what an interrupted
    replacement of ``path`` has set aside.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointUncommittedError: a save that did not finish.
    """
    where = follow(as_location(path))
    if isinstance(where, Path) and not where.is_dir():
        where = _interrupted_replacement(where)
    if is_temporary(where.name):
        raise CheckpointUncommittedError(
            f"{where} is the temporary directory of a save that did not finish; use an earlier "
            "checkpoint"
        )
    names = entries(where)
    if MANIFEST_NAME in names or METADATA_NAME in names:
        return where, names
    if any(_PART.fullmatch(name) for name in names):
        raise CheckpointUncommittedError(
            f"{where} has parts of a checkpoint and no {MANIFEST_NAME}: the save did not finish, "
            "or the manifest was not copied; use an earlier checkpoint"
        )
    inner = sorted(name for name in names if is_file(where / name / MANIFEST_NAME))
    raise CheckpointNotFoundError(
        f"{where} holds no checkpoint: no {MANIFEST_NAME}, no {METADATA_NAME}"
        + (f"; but {len(inner)} directories in it do, such as {inner[-1]}" if inner else "")
    )


def open_checkpoint(path: str | os.PathLike[str]) -> Catalog:
    """Open a committed checkpoint of this library, or one of torch.distributed.checkpoint.

    Everything but the tensors' data is checked here: the manifest's digest, presence and size of
    every file, the chunk table, the headers of the shards.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointUncommittedError: a save that did not finish.
        CheckpointCorruptError: damaged, incomplete, or with files that do not belong to it.
        CheckpointMismatchError: written by a later version of this library.
    """
    root, names = find_checkpoint(path)
    if MANIFEST_NAME not in names:
        return _open_dcp(root, None)
    manifest = read_manifest(root)
    check_listing(root, names, manifest)
    for record in manifest.files:
        check_file(root, record, manifest.uuid)
    return open_listed(root, manifest)


def is_part(name: str) -> bool:
    """Whether a file of this name may belong to a checkpoint, or to a save that never finished."""
    return name in (MANIFEST_NAME, METADATA_NAME, f"{METADATA_NAME}.tmp") or bool(
        _PART.fullmatch(name)
    )


def is_temporary(name: str) -> bool:
    """Whether a directory is named as those of saves that did not finish."""
    return bool(_TEMPORARY.search(name))


def set_aside(path: Path) -> Path | None:
    """The checkpoint that an interrupted save with ``replace=True`` has left beside ``path``.

    Only names with the uuid of a save count: what a user calls ``<name>.old-1`` is his own.
    """
    pattern = re.compile(re.escape(path.name) + r"\.old-[0-9a-f]{32}")
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    found = [p for p in siblings if pattern.fullmatch(p.name) and (p / MANIFEST_NAME).is_file()]
    return max(found, key=lambda p: p.stat().st_mtime_ns) if found else None


def _interrupted_replacement(path: Path) -> Path:
    """The checkpoint set aside for one at ``path`` that never came."""
    aside = None if os.path.lexists(path) else set_aside(path)
    if aside is None:
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        unfinished = [p.name for p in siblings if p.name.startswith(f"{path.name}.tmp-")]
        raise CheckpointNotFoundError(
            f"{path} is not a directory with a checkpoint"
            + (f"; {unfinished[0]} beside it is a save that did not finish" if unfinished else "")
        )
    return aside


def open_listed(path: Location, manifest: Manifest) -> Catalog:
    """The contents of a checkpoint whose files have been checked.

    Raises:
        CheckpointCorruptError: the chunk table, or ``.metadata``, is damaged.
    """
    tables = (CHUNKS_NAME, METADATA_NAME)
    for record in manifest.files:
        if record.name in tables:
            verify_file(path / record.name, record.digest)
    return (_open_dcp if manifest.format == "dcp" else _open_safetensors)(path, manifest)


def _open_safetensors(path: Location, manifest: Manifest) -> Catalog:
    files = {file.name: file for file in manifest.files}
    if CHUNKS_NAME not in files:
        raise CheckpointCorruptError(f"the manifest of {path} lists no {CHUNKS_NAME}")
    table = ChunkTable(path / CHUNKS_NAME, list(files))
    rows = sum(t.num_chunks for t in manifest.tensors)
    if table.uuid != manifest.uuid or table.num_rows != rows:
        raise CheckpointCorruptError(f"{path / CHUNKS_NAME} belongs to another save")
    records = {record.key: (number, record) for number, record in enumerate(manifest.tensors)}

    def chunks_of(key: str) -> list[Chunk]:
        number, record = records[key]
        chunks = table.rows(
            record.first_chunk, record.num_chunks, tensor=number, ndim=len(record.shape)
        )
        for chunk in chunks:
            file = files[chunk.file]
            stop = chunk.byte_offset + chunk.num_bytes
            if not file.header_bytes or not file.header_bytes <= chunk.byte_offset <= stop <= (
                file.num_bytes
            ):
                raise CheckpointCorruptError(
                    f"{path}: {key} should lie in bytes {chunk.byte_offset} to {stop} of "
                    f"{chunk.file}, which has {file.num_bytes}"
                )
        return chunks

    tensors = {t.key: StoredTensor(t.key, t.shape, t.dtype) for t in manifest.tensors}
    return Catalog(path, "safetensors", manifest, tensors, {}, chunks_of, table=table)


def _open_dcp(path: Location, manifest: Manifest | None) -> Catalog:
    index = DcpIndex(path)
    tensors = {
        key: StoredTensor(key, shape, dtype) for key, (shape, dtype) in index.tensors.items()
    }
    listed = None if manifest is None else {file.name for file in manifest.files}
    if manifest is not None:
        promised = {t.key: StoredTensor(t.key, t.shape, t.dtype) for t in manifest.tensors}
        if promised != tensors:
            raise CheckpointCorruptError(f"{path}: manifest and .metadata list different tensors")

    def chunks_of(key: str) -> list[Chunk]:
        for name in {location.file for location in index.locations(key)}:
            if listed is not None and name not in listed:
                raise CheckpointCorruptError(f"{path}: {key} lies in {name}, which is not listed")
        return index.chunks(key)

    return Catalog(path, "dcp", manifest, tensors, index.unsupported, chunks_of, index=index)
