"""Headers of safetensors files: written with aligned data, read with every number checked.

The format: 8 bytes little-endian length of the header, the header as JSON, then the tensors, which
must lie back to back. https://huggingface.co/docs/safetensors describes it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sharded_ema.checkpoint.checked_json import is_sizes, is_text, load_json, shown
from sharded_ema.checkpoint.files import Location, Member, OpenFile, open_regular
from sharded_ema.errors import CheckpointCorruptError, CheckpointMismatchError
from sharded_ema.model.layout import Shape

#: Complex dtypes and those of their parts. C128 is a name of our own, which safetensors lacks.
PARTS: dict[str, str] = {"C64": "F32", "C128": "F64"}
#: Bytes per element of the dtypes that this library stores, by their safetensors names.
ITEMSIZE: dict[str, int] = {
    "C128": 16,
    "C64": 8,
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}

_DTYPE = re.compile(r"[A-Z]+[0-9]{0,3}(_[A-Z0-9]+)*")

#: The limit of the reference implementation; a length beyond it is damage, not a header.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file.

    Attributes:
        key: name in the header.
        dtype: safetensors name; a key of :data:`ITEMSIZE`, or one that is not read here.
        shape: extent per dimension in elements.
        start: first byte, counted from where the data begins.
        stop: byte after the last one.
    """

    key: str
    dtype: str
    shape: Shape
    start: int
    stop: int


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of ``shape`` takes."""
    return math.prod(shape) * ITEMSIZE[dtype]


def in_parts(dtype: str, shape: Shape) -> tuple[str, Shape]:
    """The same elements as real numbers: complex ones get a last dimension of 2, others stay."""
    return (PARTS[dtype], (*shape, 2)) if dtype in PARTS else (dtype, shape)


def build_header(
    tensors: Sequence[tuple[str, str, Shape]], metadata: dict[str, str], align: int = 4096
) -> tuple[bytes, list[Entry]]:
    """The first bytes of a safetensors file, up to where its data begins.

    Args:
        tensors: ``(key, dtype, shape)`` in the order in which the data will follow.
        metadata: texts for ``__metadata__``.
        align: the data begins at a multiple of this many bytes.

    Returns:
        The bytes, and where each tensor's data goes.
    """
    entries: list[Entry] = []
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for key, dtype, shape in tensors:
        stop = position + num_bytes(dtype, shape)
        if key in header:
            raise ValueError(f"{key!r} would be in the header twice")
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        entries.append(Entry(key, dtype, tuple(shape), position, stop))
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces after the JSON are the padding that the format allows.
    text += b" " * (-(len(text) + 8) % align)
    return struct.pack("<Q", len(text)) + text, entries


def read_header(
    path: Location | Member,
) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Read and check the header of a safetensors file.

    Returns:
        The tensors by key, the texts of ``__metadata__``, and the byte where the data begins.

    Raises:
        CheckpointCorruptError: the file is not valid safetensors; holes, overlaps and a size that
            differs from what the header says included.
    """
    with open_regular(path) as file:
        return parse_header(file)


def parse_header(file: OpenFile) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The same of a file that is open.

    Raises:
        CheckpointCorruptError: see :func:`read_header`.
    """
    path, size = file.location, file.size
    prefix = file.read(0, 8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointCorruptError(
            f"{path}: the header should take {length} bytes and the file has {size}; it is "
            "truncated or no safetensors file"
        )
    text = file.read(8, length)
    header = load_json(text, str(path))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointCorruptError(f"{path}: __metadata__ must map names to texts")
    if not all(map(is_text, header)):
        raise CheckpointCorruptError(f"{path}: a tensor has a name that is no text")
    entries = {key: _entry(key, value, path) for key, value in header.items()}
    position = 0
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != position:
            raise CheckpointCorruptError(
                f"{path}: {entry.key} begins at data byte {entry.start}, not at {position} where "
                "the tensor before it ends"
            )
        position = entry.stop
    if 8 + length + position != size:
        raise CheckpointCorruptError(
            f"{path}: the header describes {8 + length + position} bytes, the file has {size}"
        )
    return entries, metadata, 8 + length


def check_dtype(dtype: Any, key: str, where: object) -> None:
    """Refuse a dtype that is not known here.

    Raises:
        CheckpointMismatchError: it may be known to others, as ``F4`` is.
        CheckpointCorruptError: it cannot be the name of one.
    """
    _check_name(dtype, key, where)
    if dtype not in ITEMSIZE:
        raise CheckpointMismatchError(
            f"{where}: {key} has the dtype {dtype}, which this version of sharded_ema does not "
            "know; update it, or convert the tensor"
        )


def _check_name(dtype: Any, key: str, where: object) -> None:
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise CheckpointCorruptError(f"{where}: {key} cannot have the dtype {shown(dtype)}")


def _entry(key: str, value: Any, path: Location) -> Entry:
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    _check_name(dtype, key, path)
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointCorruptError(f"{path}: the header entry of {key} is malformed")
    start, stop = offsets
    # Elements of those that are not known here may be smaller than a byte.
    if dtype in ITEMSIZE and stop - start != num_bytes(dtype, shape):
        raise CheckpointCorruptError(
            f"{path}: {key} has {stop - start} bytes, {dtype} of shape {tuple(shape)} takes "
            f"{num_bytes(dtype, shape)}"
        )
    return Entry(key, dtype, tuple(shape), start, stop)
