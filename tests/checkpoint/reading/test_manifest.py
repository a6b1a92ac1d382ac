"""The manifest: canonical bytes under a digest of their own."""

from __future__ import annotations

import json

import pytest
import xxhash

from sharded_ema.checkpoint.reading.manifest import (
    FileRecord,
    Manifest,
    TensorRecord,
    decode_meta,
    dump_manifest,
    encode_meta,
    parse_manifest,
)
from sharded_ema.errors import CheckpointCorruptError, CheckpointError
from tests.helpers.checkpoints import meta

MANIFEST = Manifest(
    "safetensors",
    "ab" * 16,
    {"": meta()},
    (TensorRecord("ema.w", (2, 3), "F32", 0, 2), TensorRecord("ema.ü", (), "BF16", 2, 1)),
    (FileRecord("shard-00000.safetensors", 5000, "0" * 32, 4096, "1" * 32),),
    4,
    {"torch": "2"},
)


def test_what_is_written_is_read() -> None:
    assert parse_manifest(dump_manifest(MANIFEST), "here") == MANIFEST


def test_bytes_are_canonical_and_the_digest_is_last() -> None:
    data = dump_manifest(MANIFEST)
    fields = json.loads(data)
    assert list(fields)[-1] == "digest"
    digest = fields.pop("digest")
    rest = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    assert data == rest[:-1] + b',"digest":"' + digest.encode() + b'"}'
    zeroed = data.replace(digest.encode(), b"0" * 32)
    assert xxhash.xxh3_128_hexdigest(zeroed) == digest


def test_every_changed_byte_is_found() -> None:
    data = dump_manifest(MANIFEST)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 0x20
        with pytest.raises(CheckpointCorruptError, match="here"):
            parse_manifest(bytes(changed), "here")


@pytest.mark.parametrize("cut", [0, 1, 10, 40])
def test_truncated_and_extended(cut: int) -> None:
    data = dump_manifest(MANIFEST)
    for changed in (data[:cut], data[: -cut - 1], data + b" " * (cut + 1)):
        with pytest.raises(CheckpointCorruptError):
            parse_manifest(changed, "here")


def signed(fields: dict) -> bytes:
    """A manifest with a good digest and any content."""
    head = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()[:-1] + b',"digest":"'
    return head + xxhash.xxh3_128_hexdigest(head + b"0" * 32 + b'"}').encode() + b'"}'


@pytest.mark.parametrize("field", ["format_version", "kind", "tensors", "files", "uuid", "emas"])
def test_a_good_digest_over_bad_fields(field: str) -> None:
    fields = json.loads(dump_manifest(MANIFEST))
    del fields["digest"]
    assert parse_manifest(signed(fields), "here") == MANIFEST, "the forgery itself is sound"
    del fields[field]
    with pytest.raises(CheckpointError):
        parse_manifest(signed(fields), "here")


def test_a_later_version_is_refused() -> None:
    fields = json.loads(dump_manifest(MANIFEST))
    del fields["digest"]
    with pytest.raises(CheckpointError, match="version"):
        parse_manifest(signed({**fields, "format_version": 3}), "here")


def test_meta_is_read_with_and_without_padding() -> None:
    data = encode_meta(meta(step=7))
    assert decode_meta(data, "m") == decode_meta(data.ljust(9999, b"\0"), "m") == meta(step=7)


@pytest.mark.parametrize("data", [b"", b"\0" * 9, b"[]", b"{", b"\xff", b'{"kind":"other"}'])
def test_what_is_no_meta(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="m"):
        decode_meta(data, "m")
