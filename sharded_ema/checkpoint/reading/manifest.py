"""``manifest.json``: what a checkpoint consists of. Its last field is the digest of its own bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import xxhash

from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.layout import Shape

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CHUNKS_NAME = "chunks.safetensors"
_DIGITS = 32


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor; its chunks are rows ``first_chunk`` on of the chunk table."""

    key: str
    shape: Shape
    dtype: str
    first_chunk: int
    num_chunks: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: size, xxh3-128 of all of it, and of the ``header_bytes`` before its data."""

    name: str
    num_bytes: int
    digest: str
    header_bytes: int = 0
    header_digest: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything but the chunk table.

    Attributes:
        format: ``"safetensors"`` or ``"dcp"``.
        uuid: of the save; every shard repeats it.
        emas: what each average in the checkpoint says of itself, by key prefix.
        tensors: sorted by key.
        files: all files but the manifest.
        world_size: ranks that wrote.
        libraries: versions by name.
    """

    format: str
    uuid: str
    emas: dict[str, dict[str, Any]]
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    world_size: int
    libraries: dict[str, str]


def dump_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON, digest last."""
    fields = {
        "format_version": FORMAT_VERSION,
        "kind": "ema",
        "format": manifest.format,
        "uuid": manifest.uuid,
        "emas": manifest.emas,
        "tensors": [
            {"key": t.key, "shape": list(t.shape), "dtype": t.dtype,
             "chunks": [t.first_chunk, t.num_chunks]}
            for t in manifest.tensors
        ],
        "files": [
            {"name": f.name, "bytes": f.num_bytes, "digest": f.digest,
             "header_bytes": f.header_bytes, "header_digest": f.header_digest}
            for f in manifest.files
        ],
        "world_size": manifest.world_size,
        "libraries": manifest.libraries,
    }  # fmt: skip
    body = _canonical(fields)
    blank = body[:-1] + b',"digest":"' + b"0" * _DIGITS + b'"}'
    return blank[: -_DIGITS - 2] + _digest(blank) + b'"}'


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Check the digest, then read.

    Raises:
        CheckpointCorruptError: the bytes are not those that were written, or not understood.
    """
    tail = b'"}'
    found = data[-_DIGITS - 2 : -2]
    blank = data[: -_DIGITS - 2] + b"0" * _DIGITS + tail
    if not data.endswith(tail) or not blank[:-_DIGITS - 2].endswith(b',"digest":"') or _digest(blank) != found:
        raise CheckpointCorruptError(f"{where}: the manifest does not match its own digest")
    try:
        fields = json.loads(data)
        if fields["format_version"] != FORMAT_VERSION or fields["kind"] != "ema":
            raise CheckpointCorruptError(
                f"{where}: format version {fields['format_version']} of kind {fields['kind']!r}; "
                f"this library reads version {FORMAT_VERSION}"
            )
        return Manifest(
            format=fields["format"],
            uuid=fields["uuid"],
            emas=fields["emas"],
            tensors=tuple(
                TensorRecord(t["key"], tuple(t["shape"]), t["dtype"], *t["chunks"])
                for t in fields["tensors"]
            ),
            files=tuple(
                FileRecord(f["name"], f["bytes"], f["digest"], f["header_bytes"], f["header_digest"])
                for f in fields["files"]
            ),
            world_size=fields["world_size"],
            libraries=fields["libraries"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(f"{where}: unreadable manifest: {error!r}") from error


def encode_meta(meta: dict[str, Any]) -> bytes:
    """The description of an average as canonical JSON."""
    return _canonical(meta)


def decode_meta(data: bytes, where: str) -> dict[str, Any]:
    """Read a description, zero-padded or not.

    Raises:
        CheckpointCorruptError: it is none.
    """
    try:
        meta = json.loads(data.rstrip(b"\0"))
        if meta["kind"] != "ema" or meta["version"] != 1:
            raise CheckpointCorruptError(f"{where}: version {meta['version']} is not understood")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(f"{where}: no description of an average: {error!r}") from error
    return dict(meta)


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(data: bytes) -> bytes:
    return str(xxhash.xxh3_128_hexdigest(data)).encode()
