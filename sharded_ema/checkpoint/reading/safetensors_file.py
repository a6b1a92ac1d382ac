"""The safetensors file format: header in, header out; no tensor data (numpy-free, torch-free).

A file is an 8-byte little-endian header length, a JSON header padded with spaces, and the data.
Ours pad the header so that data starts at a multiple of 4096, which lets readers map it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError
from sharded_ema.layout import Shape

ITEMSIZE: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
#: Longest header that is read; the safetensors library has the same limit.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; ``start`` and ``stop`` are bytes relative to the data section."""

    key: str
    dtype: str
    shape: Shape
    start: int
    stop: int


def build_header(
    tensors: Sequence[tuple[str, str, Shape]], metadata: dict[str, str], align: int = 4096
) -> tuple[bytes, list[Entry]]:
    """Header of a file that holds ``tensors`` (key, dtype, shape) back to back, in this order.

    Returns:
        All bytes before the data, and where each tensor goes.
    """
    entries: list[Entry] = []
    position = 0
    for key, dtype, shape in tensors:
        stop = position + math.prod(shape) * ITEMSIZE[dtype]
        entries.append(Entry(key, dtype, tuple(shape), position, stop))
        position = stop
    described: dict[str, Any] = {"__metadata__": metadata}
    for e in entries:
        described[e.key] = {
            "dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.stop]
        }  # fmt: skip
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % align)
    return struct.pack("<Q", len(text)) + text, entries


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries by key, ``__metadata__`` and the position where data starts.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointCorruptError: it is no safetensors file, or its parts do not add up.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointCorruptError(f"{path}: the header claims {length} of {size} bytes")
            text = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} does not exist") from error
    try:
        described = json.loads(text)
        metadata = described.pop("__metadata__", {})
        entries = {key: _entry(key, value) for key, value in described.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"{path}: unreadable header: {error!r}") from error
    position = 0
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        expected = math.prod(entry.shape) * ITEMSIZE[entry.dtype]
        if entry.start != position or entry.stop - entry.start != expected:
            raise CheckpointCorruptError(
                f"{path}: {entry.key} lies at {entry.start}:{entry.stop}, expected "
                f"{expected} bytes from {position}"
            )
        position = entry.stop
    if position != size - 8 - length:
        raise CheckpointCorruptError(
            f"{path}: holds {size - 8 - length} bytes of data, its header describes {position}"
        )
    return entries, metadata, 8 + length


def _entry(key: str, value: dict[str, Any]) -> Entry:
    shape = tuple(value["shape"])
    start, stop = value["data_offsets"]
    if value["dtype"] not in ITEMSIZE or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{key}: dtype {value['dtype']!r}, shape {shape}")
    return Entry(key, value["dtype"], shape, int(start), int(stop))
