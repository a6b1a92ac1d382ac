"""``manifest.json``: what a committed checkpoint consists of, under a digest of its own bytes.

The bytes are canonical JSON (sorted keys, no spaces, ASCII) except that the field ``digest`` comes
last: the xxh3-128 of all bytes with its own 32 characters set to zero. A reader can so check the
digest before it trusts any other field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from sharded_ema.averaging.schedules import is_profile_name
from sharded_ema.checkpoint.checked_json import is_sizes, is_text, load_json, shown
from sharded_ema.checkpoint.files import (
    URL,
    Bytes,
    Directory,
    Kept,
    Location,
    gone,
    is_file,
    read_whole,
)
from sharded_ema.checkpoint.names import (
    CHUNKS_NAME,
    MANIFEST_NAME,
    META_KEY,
    META_VERSION,
    is_chunks,
    is_part,
    is_plain_name,
    is_stray,
)
from sharded_ema.checkpoint.safetensors import MAX_HEADER_BYTES, check_dtype
from sharded_ema.errors import CheckpointCorruptError, CheckpointMismatchError
from sharded_ema.model.layout import Shape

FORMAT_VERSION = 2
# Of what is written with the names of files that the first version of the format knows.
_FIRST_VERSION = 1
FORMATS = ("safetensors", "dcp")

# A model of 300,000 tensors takes a quarter of it.
_MAX_MANIFEST_BYTES = 1 << 28
_DIGEST_FIELD = b',"digest":"'
_ZEROS = b"0" * 32
_TAIL_BYTES = len(_DIGEST_FIELD) + len(_ZEROS) + len(b'"}')


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One stored tensor.

    Attributes:
        key: name in the state dict that was saved.
        shape: global shape in elements.
        dtype: safetensors name.
        first_chunk: its first row in the chunk table.
        num_chunks: number of rows; 0 in the format ``"dcp"``, which has no chunk table.
    """

    key: str
    shape: Shape
    dtype: str
    first_chunk: int
    num_chunks: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the checkpoint, the manifest itself excepted.

    Attributes:
        name: plain file name inside the directory.
        num_bytes: size of the file.
        digest: xxh3-128 of the whole file in hex.
        header_bytes: where the data begins in a safetensors shard; 0 in other files.
        header_digest: xxh3-128 of those first bytes in hex; empty in other files.
    """

    name: str
    num_bytes: int
    digest: str
    header_bytes: int = 0
    header_digest: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A committed checkpoint.

    Attributes:
        format: ``"safetensors"`` or ``"dcp"``.
        uuid: of this save; every shard and the chunk table repeat it.
        emas: per key prefix (``""`` unless nested) what that average says of itself.
        tensors: sorted by key; the position is the tensor id in the chunk table.
        files: all files but the manifest; the position is the file id in the chunk table.
        world_size: number of ranks that saved.
        libraries: versions by name.
        saved_at: when it was committed, Unix time in milliseconds; 0 if not recorded.
    """

    format: str
    uuid: str
    emas: dict[str, dict[str, Any]]
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    world_size: int
    libraries: dict[str, str]
    saved_at: int = 0

    @property
    def chunks_name(self) -> str:
        """The file with the chunk table."""
        return next((file.name for file in self.files if is_chunks(file.name)), CHUNKS_NAME)

    @property
    def format_version(self) -> int:
        """The first version of the format whose readers can read it."""
        return _FIRST_VERSION if self.chunks_name == CHUNKS_NAME else FORMAT_VERSION


def dump_manifest(m: Manifest) -> bytes:
    """The bytes of ``manifest.json``."""
    body = _canonical(
        {
            "format_version": m.format_version,
            "kind": "ema",
            "format": m.format,
            "uuid": m.uuid,
            "emas": m.emas,
            "tensors": [
                {
                    "key": t.key,
                    "shape": t.shape,
                    "dtype": t.dtype,
                    "chunks": [t.first_chunk, t.num_chunks],
                }
                for t in m.tensors
            ],
            "files": [
                {
                    "name": f.name,
                    "bytes": f.num_bytes,
                    "digest": f.digest,
                    "header_bytes": f.header_bytes,
                    "header_digest": f.header_digest,
                }
                for f in m.files
            ],
            "world_size": m.world_size,
            "libraries": m.libraries,
            "saved_at": m.saved_at,
        }
    )
    head = body[:-1] + _DIGEST_FIELD
    digest = xxhash.xxh3_128_hexdigest(head + _ZEROS + b'"}')
    return head + digest.encode() + b'"}'


def manifest_digest(manifest: Manifest) -> str:
    """What a manifest says of its own bytes: xxh3-128 in hex, which covers all of a save."""
    return dump_manifest(manifest)[-len(_ZEROS) - 2 : -2].decode()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Check the digest, then every field.

    Args:
        data: the bytes of the file.
        where: its path, for messages.

    Raises:
        CheckpointCorruptError: not the bytes that were written, or fields that cannot be.
        CheckpointMismatchError: whole, but of a later format version.
    """
    head, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    digest = xxhash.xxh3_128_hexdigest(head + _DIGEST_FIELD + _ZEROS + b'"}')
    if tail != _DIGEST_FIELD + digest.encode() + b'"}':
        raise CheckpointCorruptError(f"{where} is damaged: its digest does not fit its bytes")
    fields = _Fields(load_json(data, where), where)
    version = fields.get("format_version", _is_count)
    if not _FIRST_VERSION <= version <= FORMAT_VERSION:
        raise CheckpointMismatchError(
            f"{where} has format version {version}, this version of sharded_ema reads up to "
            f"{FORMAT_VERSION}; update it"
        )
    fields.get("kind", lambda v: v == "ema")
    manifest = Manifest(
        format=fields.get("format", lambda v: v in FORMATS),
        uuid=fields.get("uuid", is_text),
        emas=fields.get("emas", lambda v: _is_table(v, dict)),
        tensors=tuple(_tensor(fields.inner(t)) for t in fields.get("tensors", _is_list)),
        files=tuple(_file(fields.inner(f)) for f in fields.get("files", _is_list)),
        world_size=fields.get("world_size", _is_count),
        libraries=fields.get("libraries", lambda v: _is_table(v, str)),
        saved_at=fields.get("saved_at", _is_count, 0),
    )
    for kind, names in (
        ("tensor", [t.key for t in manifest.tensors]),
        ("file", [f.name for f in manifest.files]),
    ):
        if len(set(names)) != len(names):
            raise CheckpointCorruptError(f"{where} lists a {kind} twice")
    return manifest


# ---------------------------------------------------------------------- the files it lists


def read_manifest(directory: Directory, *, keep: bool = False) -> Manifest:
    """The manifest of the checkpoint in a directory, which was seen to have one.

    Args:
        keep: its bytes, in the directory, for whoever asks for them later.

    Raises:
        CheckpointGoneError: it has none any more.
        CheckpointCorruptError: damaged, or fields that cannot be.
        CheckpointMismatchError: of a later version of the format.
    """
    file = directory / MANIFEST_NAME
    try:
        data = read_whole(file, _MAX_MANIFEST_BYTES)
    except CheckpointCorruptError as error:
        # Under a URL nothing is held open: what is removed loses its manifest first.
        if isinstance(directory.location, URL) and not is_file(directory.location / MANIFEST_NAME):
            raise gone(directory.location) from error
        raise
    directory.remember(MANIFEST_NAME, data)
    if keep:
        directory.kept[MANIFEST_NAME] = Kept(np.frombuffer(bytearray(data), np.uint8), len(data))
    manifest = parse_manifest(data, str(file))
    kinds = {t.key: (t.dtype, len(t.shape)) for t in manifest.tensors}
    for prefix in manifest.emas:
        if kinds.get(prefix + META_KEY) != ("U8", 1):
            raise CheckpointCorruptError(f"{file} describes an average without {META_KEY} tensor")
    return manifest


def check_listing(path: Location, names: set[str], manifest: Manifest) -> None:
    """Refuse entries of the directory that do not belong to the checkpoint.

    What file systems and the Hub leave everywhere is no harm. Under a URL what other saves have
    left, or are writing, is in nobody's way: names there tell to which save an object belongs.

    Raises:
        CheckpointCorruptError: there are such.
    """
    listed = {file.name for file in manifest.files} | {MANIFEST_NAME}
    unlisted = {name for name in names - listed if not is_stray(name)}
    if isinstance(path, URL):
        unlisted = {name for name in unlisted if not is_part(name)}
    if unlisted:
        raise CheckpointCorruptError(
            f"{path} has {len(unlisted)} files that its manifest does not list, such as "
            f"{min(unlisted)!r}; move them elsewhere"
        )


def check_file(directory: Directory, record: FileRecord, uuid: str) -> None:
    """Check a file by everything but its data: kind, size and header.

    Raises:
        CheckpointCorruptError: it is not the file that was written.
    """
    header = check_header(directory, record).tobytes()
    # With its digest all is known of it but this. To parse what it says of thousands of tensors,
    # for each of a thousand files, would take minutes; within a text its quotes would be escaped.
    length, named = int.from_bytes(header[:8], "little"), f'"uuid":{json.dumps(uuid)}'
    if header and (named.encode() not in header or 8 + length != len(header)):
        raise CheckpointCorruptError(f"{directory / record.name} belongs to another save")


def check_header(directory: Directory, record: FileRecord) -> Bytes:
    """Check kind and size of a file, and that the bytes of its header are those that were written.

    Returns:
        The header; nothing of a file that is no shard.

    Raises:
        CheckpointCorruptError: it is not the file that was written.
    """
    file = directory / record.name
    with directory.open(record.name) as opened:
        if opened.size != record.num_bytes:
            raise CheckpointCorruptError(
                f"{file} has {opened.size} bytes, {record.num_bytes} were written: it is truncated "
                "or replaced"
            )
        if record.header_bytes > min(MAX_HEADER_BYTES, opened.size):
            raise CheckpointCorruptError(f"{file} cannot have {record.header_bytes} header bytes")
        header = np.empty(record.header_bytes, np.uint8)
        if record.header_bytes:
            opened.fetch(header.data, 0)
    if record.header_bytes and xxhash.xxh3_128_hexdigest(header.data) != record.header_digest:
        raise CheckpointCorruptError(
            f"the header of {file} (bytes 0 to {record.header_bytes}) is damaged, or of another "
            "save"
        )
    return header


# ---------------------------------------------------------------------- descriptions


def encode_meta(meta: dict[str, Any]) -> bytes:
    """Canonical JSON of what an average says of itself, without padding."""
    return _canonical(meta)


def decode_meta(data: bytes, where: str) -> dict[str, Any]:
    """Read a ``_meta`` tensor's bytes; the zero padding at the end is dropped.

    Raises:
        CheckpointCorruptError: no JSON object.
        CheckpointMismatchError: not of an average, or of a later version.
    """
    meta = load_json(data.rstrip(b"\0"), where)
    check_meta(meta, where)
    return meta


def check_meta(meta: dict[str, Any], where: str) -> None:
    """Whether this version of the library can read a description; checks every field.

    Raises:
        CheckpointMismatchError: not of an average, or of a later version.
        CheckpointCorruptError: fields that cannot be.
    """
    version, kind = meta.get("version"), meta.get("kind")
    if kind != "ema" or type(version) is not int:
        raise CheckpointMismatchError(f"{where} does not describe a ShardedEMA")
    if version > META_VERSION:
        raise CheckpointMismatchError(
            f"{where} has version {version}, this version of sharded_ema reads up to "
            f"{META_VERSION}; update it"
        )
    fields = _Fields(meta, where)
    for name in ("num_updates", "applied_steps", "last_lerp_step", "start_step"):
        fields.get(name, _is_count)
    fields.get("step", lambda v: type(v) is int)
    fields.get("seed_step", lambda v: v is None or _is_count(v))
    fields.get("update_every", lambda v: _is_count(v) and v > 0)
    fields.get("nonfinite_elements", _is_count)
    fields.get("aliases", lambda v: _is_table(v, list) and all(map(_is_names, v.values())))
    fields.get("buffers", is_text)
    fields.get("frozen", is_text)
    absent = fields.inner(fields.get("absent", lambda v: isinstance(v, dict)))
    absent.get("count", _is_count)
    absent.get("names", _is_names)
    profiles = fields.get("profiles", lambda v: _is_table(v, dict) and bool(v))
    for name, settings in profiles.items():
        if not is_profile_name(name):
            raise CheckpointCorruptError(f"{where} is malformed: {shown(name)} names no profile")
        profile = fields.inner(settings)
        profile.get("schedule", lambda v: isinstance(v, dict))
        profile.get("decay", lambda v: _is_number(v) and v <= 1)
        profile.get("seed_weight", lambda v: _is_number(v) and v <= 1)
    if "decay_per" in meta:
        fields.get("decay_per", lambda v: v in ("step", "update"))
    if "run" in meta:
        fields.get("run", is_text)
    if "adapters" in meta:
        fields.get("adapters", _is_names)
    if "sampled_distance" in meta:
        fields.get(
            "sampled_distance",
            lambda v: isinstance(v, dict) and all(d is None or _is_number(d) for d in v.values()),
        )


# ---------------------------------------------------------------------- fields


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


# What is missing is told from what is null.
_MISSING = object()


class _Fields:
    """A JSON object whose fields are checked as they are taken."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise CheckpointCorruptError(f"{where} is malformed: {shown(values)} is no object")
        self._values = values
        self.where = where

    def get(self, name: str, check: Callable[[Any], bool], default: Any = _MISSING) -> Any:
        value = self._values.get(name, default)
        if value is _MISSING or not check(value):
            raise CheckpointCorruptError(
                f"{self.where} is malformed: {name!r} cannot be {shown(value)}"
            )
        return value

    def inner(self, values: Any) -> _Fields:
        return _Fields(values, self.where)


def _tensor(fields: _Fields) -> TensorRecord:
    key = fields.get("key", is_text)
    dtype = fields.get("dtype", _is_given)  # told by its own words what is wrong with it
    check_dtype(dtype, key, fields.where)
    first, count = fields.get("chunks", _is_pair)
    return TensorRecord(key, tuple(fields.get("shape", is_sizes)), dtype, first, count)


def _is_given(_: Any) -> bool:
    return True


def _is_pair(value: Any) -> bool:
    return is_sizes(value) and len(value) == 2


def _file(fields: _Fields) -> FileRecord:
    return FileRecord(
        name=fields.get("name", lambda v: is_plain_name(v) and v != MANIFEST_NAME),
        num_bytes=fields.get("bytes", _is_count),
        digest=fields.get("digest", is_text),
        header_bytes=fields.get("header_bytes", _is_count),
        header_digest=fields.get("header_digest", lambda v: isinstance(v, str)),
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_table(value: Any, of: type) -> bool:
    return isinstance(value, dict) and all(isinstance(v, of) for v in value.values())
