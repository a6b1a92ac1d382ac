"""An opened checkpoint: which tensors it holds, their bytes, and the averages among them.

Whatever reads a checkpoint is handed one :class:`Checkpoint` and nothing else of it: no function
beyond this module takes a path to read a tensor from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import xxhash

from sharded_ema.checkpoint.files import Bytes, Directory, Kept, Location, inside, read_array
from sharded_ema.checkpoint.names import (
    MANIFEST_NAME,
    META_KEY,
    METADATA_NAME,
)
from sharded_ema.checkpoint.reading.chunks import Chunk, Index, TableIndex, tiles
from sharded_ema.checkpoint.reading.dcp import DcpIndex
from sharded_ema.checkpoint.reading.manifest import (
    FileRecord,
    Manifest,
    check_file,
    check_listing,
    check_meta,
    decode_meta,
    dump_manifest,
    read_manifest,
)
from sharded_ema.checkpoint.reading.stream import stream_tensor, verify_chunk, verify_file
from sharded_ema.checkpoint.safetensors import ITEMSIZE, num_bytes
from sharded_ema.errors import CheckpointCorruptError, CheckpointMismatchError
from sharded_ema.model.layout import Box, Shape

_MAX_META_BYTES = 1 << 24
# Ten times the chunk table of a trillion parameters on a thousand ranks.
_MAX_TABLE_BYTES = 1 << 32


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        checkpoint: that holds it.
        key: by which it does.
        shape: global, in elements.
        dtype: safetensors name, or what another one is called that is not read here.
    """

    checkpoint: Checkpoint = field(repr=False, compare=False)
    key: str
    shape: Shape
    dtype: str

    @property
    def is_read(self) -> bool:
        """Whether this library knows the dtype; else there is nothing to do but to leave it out."""
        return self.dtype in ITEMSIZE

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Of all its elements."""
        return num_bytes(self.dtype, self.shape)

    def chunks(self) -> list[Chunk]:
        """Where its data lies: blocks that fill it with neither hole nor overlap.

        Raises:
            CheckpointCorruptError: the blocks do not fit the tensor or the files.
        """
        chunks = self.checkpoint.index.chunks(self.key)
        self.check(chunks)
        if not tiles((chunk.box for chunk in chunks), self.shape):
            stored = sum(chunk.num_bytes for chunk in chunks)
            raise CheckpointCorruptError(
                f"{self.checkpoint.path}: the chunks of {self.key} leave holes or overlap: they "
                f"hold {stored} of {self.num_bytes} bytes"
            )
        return chunks

    def check(self, chunks: Iterable[Chunk]) -> None:
        """Whether chunks of it can lie where they do.

        Raises:
            CheckpointCorruptError: one does not fit the tensor.
        """
        for chunk in chunks:
            self.check_box(chunk.box)
            size = chunk.box.numel * self.itemsize
            if chunk.num_bytes != size:
                raise CheckpointCorruptError(
                    f"{self.checkpoint.path}: {self.key} has a chunk of {chunk.num_bytes} bytes, "
                    f"{self.dtype} of shape {chunk.box.sizes} takes {size}"
                )

    def check_box(self, box: Box) -> None:
        """Whether a chunk of it can hold these elements.

        Raises:
            CheckpointCorruptError: it cannot.
        """
        if not box.fits(self.shape) or not box.numel:
            raise CheckpointCorruptError(
                f"{self.checkpoint.path}: {self.key} has shape {self.shape} and a chunk at "
                f"{box.offsets} of size {box.sizes}"
            )

    def blocks(self, chunks: list[Chunk] | None = None, block_bytes: int = 0) -> Iterator[Bytes]:
        """Its bytes in C order, block by block; see :func:`.stream.stream_tensor`.

        Args:
            chunks: what :meth:`chunks` has returned, if it was asked before.
            block_bytes: read at a time, whole elements; 0 for 4 MiB.

        Raises:
            CheckpointCorruptError: a chunk is damaged. Blocks before it may have been yielded.
        """
        return stream_tensor(
            self.checkpoint.directory,
            self.key,
            self.shape,
            self.itemsize,
            self.chunks() if chunks is None else chunks,
            block_bytes,
        )

    def verify(self) -> None:
        """Compare its data with the checksums of its chunks; those without any are not read.

        Raises:
            CheckpointCorruptError: it is not what was written.
        """
        for chunk in self.chunks():
            verify_chunk(self.checkpoint.directory, chunk, self.key)

    def read(self) -> bytes:
        """All bytes of a small tensor in C order, checked.

        Raises:
            CheckpointCorruptError: they are not what was written.
        """
        return b"".join(block.tobytes() for block in self.blocks())


class Checkpoint:
    """The contents of one committed checkpoint; a context manager that closes its files.

    Args:
        directory: where it lies.
        index: where its tensors lie in it.
        manifest: ``None`` for what this library did not write.

    Attributes:
        directory, index, manifest: see above.
        tensors: by key.
        unread: those of a dtype that this library does not read.
    """

    def __init__(self, directory: Directory, index: Index, manifest: Manifest | None = None):
        self.directory = directory
        self.index = index
        self.manifest = manifest
        self.tensors, self.unread = (
            {key: StoredTensor(self, key, shape, dtype) for key, (shape, dtype) in found.items()}
            for found in (index.tensors, index.unsupported)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that reading has opened; who reads on opens them again."""
        self.directory.files.close()

    @property
    def path(self) -> Location:
        """Its directory or URL."""
        return self.directory.location

    @property
    def format(self) -> str:
        """``"safetensors"``, ``"dcp"`` for torch's own, or that of another source."""
        return self.index.format

    @property
    def verified_metadata(self) -> bool:
        """Whether a digest covers what is said of the tensors, not only their data."""
        return self.manifest is not None

    # ------------------------------------------------------------------ averages

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
        tensor = self.tensors[prefix + META_KEY]
        if tensor.num_bytes > _MAX_META_BYTES:
            raise CheckpointCorruptError(
                f"{tensor.key} in {self.path} has {tensor.num_bytes} bytes, which no description "
                "takes"
            )
        return decode_meta(tensor.read(), f"{tensor.key} in {self.path}")

    # ------------------------------------------------------------------ what was written

    def verify_files(self, names: set[str] | None = None) -> None:
        """Compare whole files with their digests in the manifest; all of them if none is named.

        Raises:
            CheckpointCorruptError: one is not what was written.
        """
        for record in self.manifest.files if self.manifest is not None else ():
            if names is None or record.name in names:
                verify_file(self.directory / record.name, record.digest)

    def identity(self, keys: Iterable[str]) -> str:
        """A digest that tells these tensors of this save from those of another.

        It is that of the manifest, which has a digest of every file. Where there is none it is of
        places and sizes of the blocks, and sizes and times of the files; under a URL of checksums.

        Raises:
            CheckpointCorruptError: the blocks of a tensor do not fit it or its file.
        """
        if self.manifest is not None:
            return xxhash.xxh3_128_hexdigest(dump_manifest(self.manifest))
        known = xxhash.xxh3_128()
        names: set[str] = set()
        unchecked = False
        for key in keys:
            if isinstance(self.index, DcpIndex) and isinstance(self.path, Path):
                # Chunks would read the tail of each entry, as whoever reads the tensor does again.
                places = self.index.locations(key)
                known.update(repr((key, places)).encode())
                names.update(at.file for at in places)
                continue
            for chunk in self.tensors[key].chunks():
                known.update(repr((key, chunk)).encode())
                names.add(chunk.file)
                unchecked |= chunk.crc32 is None
        for name in sorted(names):
            if isinstance(self.path, Path):
                try:
                    found = os.stat(inside(self.path, name))
                except OSError:
                    raise CheckpointCorruptError(f"{self.path / name} is missing") from None
                known.update(repr((name, found.st_size, found.st_mtime_ns)).encode())
            elif unchecked:  # not every store says when an object was written
                return uuid4().hex
        return known.hexdigest()


def open_directory(
    directory: Directory, names: Iterable[str], *, check_files: bool = True
) -> Checkpoint:
    """Open the checkpoint in a directory, one of this library or of DCP.

    Everything but the tensors' data is checked here: the manifest's digest, presence and size of
    every file, the chunk table, the headers of the shards.

    Args:
        names: in the directory; a manifest or DCP's metadata is among them.
        check_files: look at the files with the data as well. If not, what tells where the data lies
            is read whole and once, and kept in memory; what is kept there already is not read.

    Raises:
        CheckpointUncommittedError: DCP's metadata is that of a save that did not finish.
        CheckpointCorruptError: damaged, incomplete, or with files that do not belong to it.
        CheckpointMismatchError: written by a later version of this library.
    """
    if MANIFEST_NAME not in names:
        if not check_files:
            _keep(directory, METADATA_NAME)
        return Checkpoint(directory, DcpIndex(directory))
    manifest = read_manifest(directory, keep=not check_files)
    check_listing(directory.location, set(names), manifest)
    tables = _tables(manifest)
    for record in manifest.files:
        if check_files:
            check_file(directory, record, manifest.uuid)
        elif record.name in tables:
            _keep(directory, record.name)
    return open_listed(directory, manifest)


def _keep(directory: Directory, name: str) -> None:
    if name not in directory.kept:
        data = read_array(directory / name, _MAX_TABLE_BYTES)
        directory.kept[name] = Kept(data, data.nbytes)


def _tables(manifest: Manifest) -> tuple[str, str]:
    """Names of the files, one of which tells where the data lies."""
    return manifest.chunks_name, METADATA_NAME


def data_files(manifest: Manifest) -> list[FileRecord]:
    """The files of a checkpoint that hold data."""
    tables = _tables(manifest)
    return [record for record in manifest.files if record.name not in tables]


def open_listed(directory: Directory, manifest: Manifest) -> Checkpoint:
    """The contents of a checkpoint whose files have been checked.

    Raises:
        CheckpointCorruptError: the chunk table, or ``.metadata``, is damaged.
    """
    tables = _tables(manifest)
    for record in manifest.files:
        kept = directory.kept.get(record.name)
        # Who gives only the beginning to others has compared the whole.
        if record.name in tables and (kept is None or kept.is_whole):
            verify_file(directory / record.name, record.digest)
    if manifest.format == "safetensors":
        return Checkpoint(directory, TableIndex(directory, manifest), manifest)
    index = DcpIndex(directory, {file.name for file in manifest.files})
    if {t.key: (t.shape, t.dtype) for t in manifest.tensors} != index.tensors:
        raise CheckpointCorruptError(
            f"{directory.location}: manifest and .metadata list different tensors"
        )
    return Checkpoint(directory, index, manifest)
