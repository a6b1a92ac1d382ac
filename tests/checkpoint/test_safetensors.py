"""Headers of safetensors files against the safetensors library itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sharded_ema.checkpoint.safetensors import ITEMSIZE, build_header, read_header
from sharded_ema.errors import CheckpointCorruptError

TENSORS = [("a", "F64", (2, 3)), ("ü.b", "F32", ()), ("empty", "F32", (0, 3)), ("c", "U8", (5,))]


def write(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(header + data)
    return path


def test_the_library_reads_what_we_build(tmp_path: Path) -> None:
    header, entries = build_header(TENSORS, {"format": "pt", "uuid": "x"})
    assert len(header) % 4096 == 0
    data = bytes(range(48 + 4 + 5))
    path = write(tmp_path / "f", header, data)
    loaded = load_file(path)
    for entry in entries:
        assert loaded[entry.key].shape == entry.shape
        assert loaded[entry.key].tobytes() == data[entry.start : entry.stop]
    with safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt", "uuid": "x"}


def test_we_read_what_we_build(tmp_path: Path) -> None:
    header, entries = build_header(TENSORS, {"uuid": "x"}, align=64)
    found, metadata, start = read_header(write(tmp_path / "f", header, bytes(57)))
    assert found == {e.key: e for e in entries}
    assert metadata == {"uuid": "x"}
    assert start == len(header) and start % 64 == 0


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {"w": np.zeros((3, 4), np.float16), "n": np.array(7), "b": np.ones(3, bool)}
    save_file(arrays, tmp_path / "f")
    entries, metadata, _ = read_header(tmp_path / "f")
    assert {k: (e.dtype, e.shape) for k, e in entries.items()} == {
        "w": ("F16", (3, 4)), "n": ("I64", ()), "b": ("BOOL", (3,))
    }  # fmt: skip
    assert metadata == {}
    assert all(e.stop - e.start == arrays[k].nbytes for k, e in entries.items())
    assert ITEMSIZE["BF16"] == 2


def forged(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(start: int, stop: int, **changes: object) -> dict[str, object]:
    shape = [(stop - start) // 4]
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop], **changes}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 10) + b"{}",
        forged([]),
        forged({"a": entry(0, 8)})[:-3],
        forged({"a": entry(0, 4)}),  # data is missing from the end
        forged({"a": entry(0, 12)}),
        forged({"a": entry(4, 8)}),
        forged({"a": entry(0, 4), "b": entry(0, 8)}),
        forged({"a": entry(0, 8, dtype="f32!")}),
        forged({"a": entry(0, 8, dtype="")}),
        forged({"a": entry(0, 8, dtype=["F32"])}),
        forged({"a": entry(0, 8, shape=[-2])}),
        forged({"a": entry(0, 8, shape=[3])}),
        forged({"a": entry(0, 8, shape=[1 << 62, 1 << 62])}),
        forged({"a": entry(0, 8, data_offsets=[0])}),
        forged({"a": 7}),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CheckpointCorruptError, match="f"):
        read_header(write(tmp_path / "f", header, bytes(8)))


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "F8_E4M3FNUZ"])
def test_dtypes_that_came_later_are_no_damage(tmp_path: Path, dtype: str) -> None:
    entries, _, _ = read_header(
        write(tmp_path / "f", forged({"a": entry(0, 8, dtype=dtype, shape=[8])}), bytes(8))
    )
    assert entries["a"].dtype == dtype and entries["a"].shape == (8,)
    with pytest.raises(CheckpointCorruptError, match="a begins at data byte 1"):
        read_header(
            write(tmp_path / "f", forged({"a": entry(1, 8, dtype=dtype, shape=[7])}), bytes(8))
        )


def test_the_forgeries_are_sound_but_for_what_they_change(tmp_path: Path) -> None:
    read_header(write(tmp_path / "f", forged({"a": entry(0, 8)}), bytes(8)))
