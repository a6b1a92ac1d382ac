"""The manifest of a checkpoint, and whether the files beside it are those that it lists."""

from __future__ import annotations

import xxhash

from sharded_ema.checkpoint.files import inside, open_regular, read_whole
from sharded_ema.checkpoint.location import Location
from sharded_ema.checkpoint.reading.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    parse_manifest,
)
from sharded_ema.checkpoint.safetensors import MAX_HEADER_BYTES, read_header
from sharded_ema.config import META_KEY
from sharded_ema.errors import CheckpointCorruptError

# A model of 300,000 tensors takes a quarter of it.
_MAX_MANIFEST_BYTES = 1 << 28


def read_manifest(path: Location) -> Manifest:
    """The manifest of the checkpoint in the directory ``path``.

    Raises:
        CheckpointCorruptError: damaged, or fields that cannot be.
        CheckpointMismatchError: of a later version of the format.
    """
    file = inside(path, MANIFEST_NAME)
    manifest = parse_manifest(read_whole(file, _MAX_MANIFEST_BYTES), str(file))
    kinds = {t.key: (t.dtype, len(t.shape)) for t in manifest.tensors}
    for prefix in manifest.emas:
        if kinds.get(prefix + META_KEY) != ("U8", 1):
            raise CheckpointCorruptError(f"{file} describes an average without {META_KEY} tensor")
    return manifest


def check_listing(path: Location, names: set[str], manifest: Manifest) -> None:
    """Refuse entries of the directory that do not belong to the checkpoint.

    Raises:
        CheckpointCorruptError: there are such.
    """
    unlisted = names - {file.name for file in manifest.files} - {MANIFEST_NAME}
    if unlisted:
        raise CheckpointCorruptError(
            f"{path} has {len(unlisted)} files that its manifest does not list, such as "
            f"{min(unlisted)!r}; move them elsewhere"
        )


def check_file(path: Location, record: FileRecord, uuid: str) -> None:
    """Check a file by everything but its data: kind, size and header.

    Raises:
        CheckpointCorruptError: it is not the file that was written.
    """
    file = inside(path, record.name)
    with open_regular(file) as opened:
        if opened.size != record.num_bytes:
            raise CheckpointCorruptError(
                f"{file} has {opened.size} bytes, {record.num_bytes} were written: it is truncated "
                "or replaced"
            )
        if not record.header_bytes:
            return
        if record.header_bytes > MAX_HEADER_BYTES:
            raise CheckpointCorruptError(f"{file} cannot have {record.header_bytes} header bytes")
        header = opened.read(0, record.header_bytes)
    if xxhash.xxh3_128_hexdigest(header) != record.header_digest:
        raise CheckpointCorruptError(
            f"the header of {file} (bytes 0 to {record.header_bytes}) is damaged, or of another "
            "save"
        )
    _, metadata, start = read_header(file)
    if metadata.get("uuid") != uuid or start != record.header_bytes:
        raise CheckpointCorruptError(f"{file} belongs to another save")
