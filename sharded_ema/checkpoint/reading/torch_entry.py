"""Where the data lies in one tensor that ``torch.save`` wrote: a zip archive with a small pickle.

The pickle is parsed with an allow-list that can build nothing but tuples, texts and dicts. Its
zip records carry the CRC32 of the data, which torch itself never checks.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, NoReturn

from sharded_ema.checkpoint.reading.safetensors_file import ITEMSIZE
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.layout import Shape, c_strides

# What an allow-listed unpickler can raise on bytes that are not what they should be.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
# zipfile says NotImplementedError of archives with features (encryption, versions) it lacks.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, OSError, KeyError, ValueError)
_MAX_PICKLE_BYTES = 1 << 20
_LOCAL_HEADER_BYTES = 30

#: safetensors names of torch's dtypes and of its typed storages.
DTYPE_NAMES: dict[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_STORAGE_NAMES: dict[str, str] = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """The raw data of one saved tensor.

    Attributes:
        dtype: safetensors name.
        shape: extent per dimension in elements.
        byte_offset: position of the data in the file.
        num_bytes: length of the data.
        crc32: of the data, ``None`` where the writer was told to leave it out.
        strides: in elements, ``None`` for C order.
    """

    dtype: str
    shape: Shape
    byte_offset: int
    num_bytes: int
    crc32: int | None
    strides: Shape | None


def locate(descriptor: int, offset: int, length: int, where: str) -> StoredEntry:
    """Find the data of the entry in bytes ``offset`` to ``offset + length`` of an open file.

    Args:
        where: what is being read, for messages.

    Raises:
        CheckpointCorruptError: no such entry, or one that this library does not read.
    """
    window = _Window(descriptor, offset, length)
    try:
        with zipfile.ZipFile(io.BufferedReader(window)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                raise CheckpointCorruptError(f"{where} is compressed, which torch never does")
            order = records.get("byteorder")
            if order is not None and _read_small(descriptor, offset, order, where) != b"little":
                raise CheckpointCorruptError(f"{where} was written on a big-endian machine")
            head = _read_small(descriptor, offset, records["data.pkl"], where)
            rebuild = _unpickle(head, where)
            dtype, storage, shape, strides = _described(rebuild, where)
            data = records[f"data/{storage}"]
    except _ZIP_ERRORS as error:
        raise CheckpointCorruptError(f"{where} cannot be read as a saved tensor: {error}") from None
    start = _data_start(descriptor, offset, data, where)
    size = math.prod(shape) * ITEMSIZE[dtype]
    if data.file_size != size or start + size > offset + length:
        raise CheckpointCorruptError(
            f"{where} holds {data.file_size} bytes, {dtype} of shape {shape} takes {size}"
        )
    # torch writes a zero where it was told not to compute the sum.
    return StoredEntry(dtype, shape, start, size, data.CRC or None, strides)


class _Window(io.RawIOBase):
    """Part of a file as a file, so that ``zipfile`` finds an archive inside it."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + position < 0:
            raise ValueError("seek before the entry begins")
        self._position = start + position
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [view], self._offset + self._position)
        self._position += count
        return count


def _read_small(descriptor: int, offset: int, info: zipfile.ZipInfo, where: str) -> bytes:
    """A record that must be held whole; ``zipfile`` would insist on a CRC32 that may be absent."""
    if info.file_size > _MAX_PICKLE_BYTES:
        raise CheckpointCorruptError(f"{where}: its {info.filename} takes {info.file_size} bytes")
    data = os.pread(descriptor, info.file_size, _data_start(descriptor, offset, info, where))
    if info.CRC and zlib.crc32(data) != info.CRC:
        raise CheckpointCorruptError(f"{where}: its {info.filename} is damaged (CRC32 mismatch)")
    return data


def _data_start(descriptor: int, offset: int, info: zipfile.ZipInfo, where: str) -> int:
    # Names and padding in the local header differ from the central directory's.
    start = offset + info.header_offset
    header = os.pread(descriptor, _LOCAL_HEADER_BYTES, start)
    if len(header) != _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise CheckpointCorruptError(f"{where}: the zip header of its data is damaged")
    name_bytes = int.from_bytes(header[26:28], "little")
    extra_bytes = int.from_bytes(header[28:30], "little")
    return start + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes


class _Rebuild:
    """The arguments with which torch would rebuild the tensor."""

    __slots__ = ("arguments",)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> NoReturn:
        # Its presence also keeps a pickle from setting attributes on this class.
        raise pickle.UnpicklingError("it sets a state on a tensor")


class _TensorUnpickler(pickle.Unpickler):
    """Reads ``data.pkl`` of a plain tensor; any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _Rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return name
        if module == "torch" and (name in DTYPE_NAMES or name in _STORAGE_NAMES):
            return name
        raise pickle.UnpicklingError(f"it names the forbidden global {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _unpickle(data: bytes, where: str) -> _Rebuild:
    try:
        value = _TensorUnpickler(io.BytesIO(data)).load()
    except UNPICKLING_ERRORS as error:
        raise CheckpointCorruptError(f"{where} is not a saved tensor: {error}") from None
    if not isinstance(value, _Rebuild):
        _refuse(where)
    return value


def _described(rebuild: _Rebuild, where: str) -> tuple[str, str, Shape, Shape | None]:
    """Dtype, name of the storage record, shape and strides."""
    try:
        storage, storage_offset, shape, strides, *rest = rebuild.arguments
        _, storage_type, record, _, _ = storage
    except (TypeError, ValueError):
        _refuse(where)
    # A storage without a type is followed by the dtype, after requires_grad and hooks.
    dtype = _STORAGE_NAMES.get(storage_type) if isinstance(storage_type, str) else None
    if storage_type == "UntypedStorage" and len(rest) > 2 and isinstance(rest[2], str):
        dtype = DTYPE_NAMES.get(rest[2])
    if (
        dtype is None
        or not isinstance(record, str)
        or not is_shape(shape)
        or not is_shape(strides)
        or len(shape) != len(strides)
        or storage_offset != 0
    ):
        _refuse(where)
    return dtype, record, shape, _unless_c_order(shape, strides, where)


def _unless_c_order(shape: Shape, strides: Shape, where: str) -> Shape | None:
    pairs = [(t, n) for t, n in zip(strides, shape, strict=True) if n != 1]
    if 0 in shape or [t for t, _ in pairs] == [
        t for t, n in zip(c_strides(shape), shape, strict=True) if n != 1
    ]:
        return None
    # Any order of the dimensions will do, as long as the elements lie without gaps or sharing.
    expected = 1
    for stride, size in sorted(pairs):
        if stride != expected:
            raise CheckpointCorruptError(f"{where} has strides {strides}, which leave gaps")
        expected *= size
    return strides


def is_shape(value: Any) -> bool:
    """Whether an unpickled value is a tuple of integers, none of them negative."""
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _refuse(where: str) -> NoReturn:
    raise CheckpointCorruptError(f"{where} is not a plain tensor as torch.save writes it")
