"""Where the data lies in one tensor that ``torch.save`` wrote: a zip archive with a small pickle.

The pickle is taken apart and never loaded. The zip records carry the CRC32 of their data, which
torch itself never checks.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, NoReturn

from sharded_ema.checkpoint.checked_json import MAX_DIMS, is_sizes
from sharded_ema.checkpoint.files import OpenFile
from sharded_ema.checkpoint.reading.pickles import PERSISTENT, Global, Note, take_apart
from sharded_ema.checkpoint.safetensors import ITEMSIZE
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Shape, c_strides

# zipfile says NotImplementedError of archives with features (encryption, versions) it lacks.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error)
_MAX_PICKLE_BYTES = 1 << 20
# Of a whole state dict: about 80,000 tensors.
_MAX_STATE_BYTES = 1 << 24
# Some 50,000 records, of which a tensor has seven and an optimizer's state as many as tensors.
_MAX_DIRECTORY_BYTES = 1 << 22
_END_BYTES = 22
_TAIL_BYTES = _END_BYTES + 20 + 56
_LOCAL_HEADER_BYTES = 30
_LOCAL_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x1

_REBUILD = {Global("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3")}
_UNTYPED = Global("torch.storage", "UntypedStorage")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ORDERED = Global("collections", "OrderedDict")
_KNOWN = {*_REBUILD, _UNTYPED, _PARAMETER, _ORDERED}
# Names in torch of dtypes and typed storages, also of those that are not read.
_TYPE = re.compile(
    r"(bfloat|float|complex|u?int|qu?int|bits)\d[0-9a-z_]*|bool|[A-Z][A-Za-z0-9]*Storage"
)

#: safetensors names of torch's dtypes and of its typed storages.
DTYPE_NAMES: dict[str, str] = {
    "complex128": "C128",
    "complex64": "C64",
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
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
    "ComplexDoubleStorage": "C128",
    "ComplexFloatStorage": "C64",
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
        dtype: safetensors name; what torch calls it if that is not read here, nor its place known.
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


@dataclass(frozen=True, slots=True)
class Record:
    """One file of a zip archive, as its central directory has it.

    Attributes:
        name: without the folder that torch puts all of them in.
        byte_offset: position of its data in the file around the archive.
        num_bytes: length of the data.
        crc32: of the data, ``None`` where the writer was told to leave it out.
    """

    name: str
    byte_offset: int
    num_bytes: int
    crc32: int | None


def locate(file: OpenFile, offset: int, length: int, where: str) -> StoredEntry:
    """Find the data of the entry in bytes ``offset`` to ``offset + length`` of an open file.

    Args:
        where: what is being read, for messages.

    Raises:
        CheckpointCorruptError: no such entry, or one that this library does not read.
    """
    head, infos = _head(file, offset, length, where)
    return _entry(head, file, offset, infos, where)


def read_file(file: OpenFile, where: str) -> Any:
    """What a file of ``torch.save`` says: dicts, lists, texts and numbers, with entries as tensors.

    Raises:
        CheckpointCorruptError: no such file, or one that would make other objects.
    """
    if file.read(0, len(_LOCAL_MAGIC)) != _LOCAL_MAGIC:
        raise CheckpointCorruptError(
            f"{where} is no archive, as torch.save writes them since PyTorch 1.6: it is damaged, "
            "or so old that it has to be loaded and saved again"
        )
    head, infos = _head(file, 0, file.size, where, _MAX_STATE_BYTES)
    return _plain(head, file, infos, where, MAX_DIMS)


def _plain(
    value: Any, file: OpenFile, infos: dict[str, zipfile.ZipInfo], where: str, depth: int
) -> Any:
    if not depth:
        raise CheckpointCorruptError(f"{where} nests its contents deeper than any state does")

    def inner(each: Any) -> Any:
        return _plain(each, file, infos, where, depth - 1)

    if isinstance(value, Note) and value.of == _PARAMETER and value.arguments:
        value = value.arguments[0]
    if isinstance(value, Note) and value.of == _ORDERED:
        value = value.items or {}
    if isinstance(value, Note):
        return _entry(value, file, 0, infos, where, in_part=True)
    if isinstance(value, dict):
        return {key: inner(each) for key, each in value.items() if isinstance(key, str)}
    return [inner(each) for each in value] if isinstance(value, list) else value


def _head(
    file: OpenFile, offset: int, length: int, where: str, limit: int = _MAX_PICKLE_BYTES
) -> tuple[Any, dict[str, zipfile.ZipInfo]]:
    """The pickle of an archive, taken apart, and its records."""
    infos = _directory(file, offset, length, where)
    order = infos.get("byteorder")
    if order is not None and _read_small(file, offset, order, where) != b"little":
        raise CheckpointCorruptError(f"{where} was written on a big-endian machine")
    if "data.pkl" not in infos:
        _refuse(where)
    data = _read_small(file, offset, infos["data.pkl"], where, limit)
    return take_apart(data, _allowed, where), infos


def _entry(
    rebuild: Any,
    file: OpenFile,
    offset: int,
    infos: dict[str, zipfile.ZipInfo],
    where: str,
    *,
    in_part: bool = False,
) -> StoredEntry:
    """Where a tensor's data lies.

    Args:
        in_part: whether it may be a view of some of a storage, of which no sum is known; or of a
            dtype that is not read.
    """
    dtype, storage, first, shape, strides = _described(rebuild, where)
    if dtype not in ITEMSIZE:
        if not in_part:
            _refuse(where)
        return StoredEntry(dtype, shape, 0, 0, None, None)
    info = infos.get(f"data/{storage}")
    if info is None or (first and not in_part):
        _refuse(where)
    data = _record(file, offset, info, where)
    size, start = math.prod(shape) * ITEMSIZE[dtype], first * ITEMSIZE[dtype]
    whole = data.num_bytes == size
    if not whole and (not in_part or start + size > data.num_bytes):
        raise CheckpointCorruptError(
            f"{where} holds {data.num_bytes} bytes, {dtype} of shape {shape} takes {size}"
        )
    crc32 = data.crc32 if whole else None
    return StoredEntry(dtype, shape, data.byte_offset + start, size, crc32, strides)


def records(file: OpenFile, offset: int, length: int, where: str) -> list[Record]:
    """All files of the archive in bytes ``offset`` to ``offset + length`` of an open file.

    Raises:
        CheckpointCorruptError: no archive as torch writes it.
    """
    infos = _directory(file, offset, length, where)
    return [_record(file, offset, info, where) for info in infos.values()]


def _directory(file: OpenFile, offset: int, length: int, where: str) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by name, none of them compressed, repeated or in another's bytes."""
    if offset + length > file.size:
        raise CheckpointCorruptError(
            f"{where}: its file ends before byte {offset + length}; it is truncated or replaced"
        )
    _check_directory_size(file, offset, length, where)
    window = _Window(file, offset, length)
    try:
        with zipfile.ZipFile(io.BufferedReader(window)) as archive:
            listed, end = archive.infolist(), archive.start_dir
    except _ZIP_ERRORS as error:
        raise CheckpointCorruptError(f"{where} cannot be read as a saved tensor: {error}") from None
    found: dict[str, zipfile.ZipInfo] = {}
    for info in sorted(listed, key=lambda i: i.header_offset, reverse=True):
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointCorruptError(f"{where} is compressed, which torch never does")
        if info.flag_bits & _ENCRYPTED:
            raise CheckpointCorruptError(f"{where} is encrypted, which torch never does")
        if not 0 <= info.header_offset <= end - _LOCAL_HEADER_BYTES - info.file_size:
            raise CheckpointCorruptError(f"{where} has records that overlap or lie outside")
        end = info.header_offset
        name = info.filename.partition("/")[2]
        if name in found:
            raise CheckpointCorruptError(f"{where} has two records {name!r}")
        found[name] = info
    return found


def _check_directory_size(file: OpenFile, offset: int, length: int, where: str) -> None:
    """Refuse an archive whose directory, which is held whole, is larger than any can be.

    That it lies at its end, without a comment, ``zipfile`` would look for in vain otherwise.
    """
    tail = file.read(offset + max(0, length - _TAIL_BYTES), min(length, _TAIL_BYTES))
    end = tail[-_END_BYTES:]
    if len(end) != _END_BYTES or end[:4] != b"PK\x05\x06":
        raise CheckpointCorruptError(
            f"{where} cannot be read as a saved tensor: no archive ends with it"
        )
    (size,) = struct.unpack("<L", end[12:16])
    # Behind a locator of 20 bytes, what has its numbers in 64 bits takes 56.
    locator, end64 = tail[-_END_BYTES - 20 : -_END_BYTES], tail[-_TAIL_BYTES:]
    if locator[:4] == b"PK\x06\x07" and len(end64) == _TAIL_BYTES and end64[:4] == b"PK\x06\x06":
        (size,) = struct.unpack("<Q", end64[40:48])
    if size > min(length, _MAX_DIRECTORY_BYTES):
        raise CheckpointCorruptError(
            f"{where} claims a directory of {size} bytes, more than a saved tensor can have"
        )


class _Window(io.RawIOBase):
    """Part of a file as a file, so that ``zipfile`` finds an archive inside it."""

    def __init__(self, file: OpenFile, offset: int, length: int) -> None:
        super().__init__()
        self._file = file
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
        count = self._file.read_at(view, self._offset + self._position)
        self._position += count
        return count


def _read_small(
    file: OpenFile,
    offset: int,
    info: zipfile.ZipInfo,
    where: str,
    limit: int = _MAX_PICKLE_BYTES,
) -> bytes:
    """A record that must be held whole; ``zipfile`` would insist on a CRC32 that may be absent."""
    if info.file_size > limit:
        raise CheckpointCorruptError(f"{where}: its {info.filename} takes {info.file_size} bytes")
    record = _record(file, offset, info, where)
    data = file.read(record.byte_offset, record.num_bytes)
    if len(data) != record.num_bytes or record.crc32 not in (None, zlib.crc32(data)):
        raise CheckpointCorruptError(f"{where}: its {info.filename} is damaged (CRC32 mismatch)")
    return data


def _record(file: OpenFile, offset: int, info: zipfile.ZipInfo, where: str) -> Record:
    # Its padding is in the local header only.
    start = offset + info.header_offset
    name = info.orig_filename.encode()
    header = file.read(start, _LOCAL_HEADER_BYTES + len(name))
    lengths = header[26:30]
    if (
        len(header) != _LOCAL_HEADER_BYTES + len(name)
        or header[:4] != _LOCAL_MAGIC
        or lengths[:2] != len(name).to_bytes(2, "little")
        or header[_LOCAL_HEADER_BYTES:] != name
    ):
        raise CheckpointCorruptError(f"{where}: the zip header of its {info.filename} is damaged")
    start += len(header) + int.from_bytes(lengths[2:], "little")
    # torch writes a zero where it was told not to compute the sum.
    return Record(info.filename.partition("/")[2], start, info.file_size, info.CRC or None)


def _allowed(found: Global) -> bool:
    if found.module == "torch":
        return bool(_TYPE.fullmatch(found.name))
    return found == PERSISTENT or found in _KNOWN


def _described(rebuild: Any, where: str) -> tuple[str, str, int, Shape, Shape | None]:
    """Dtype, name of the storage record, first element in it, shape and strides.

    The dtype is what safetensors calls it, or torch if it is not read here.
    """
    if not isinstance(rebuild, Note) or rebuild.of not in _REBUILD or rebuild.state is not None:
        _refuse(where)
    try:
        storage, storage_offset, shape, strides, *rest = rebuild.arguments
        (identifier,) = storage.arguments
        _, storage_type, record, _, _ = identifier
    except (AttributeError, TypeError, ValueError):
        _refuse(where)
    if storage.of != PERSISTENT or not isinstance(storage_type, Global):
        _refuse(where)
    dtype = _STORAGE_NAMES.get(storage_type.name, storage_type.name)
    # Bits that say that the values are conjugates, or negative, of what is stored come last.
    # A storage without a type is followed by the dtype, after requires_grad and hooks.
    if storage_type == _UNTYPED and len(rest) > 2 and isinstance(rest[2], Global):
        dtype = DTYPE_NAMES.get(rest[2].name, rest[2].name)
    if (
        not isinstance(record, str)
        or not is_shape(shape)
        or not is_shape(strides)
        or len(shape) != len(strides)
        or not is_sizes([storage_offset])
        or any(isinstance(bits, dict) and any(bits.values()) for bits in rest)
    ):
        _refuse(where)
    return dtype, record, storage_offset, shape, _unless_c_order(shape, strides, where)


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
    """Whether a value from a pickle is a tuple of sizes."""
    return isinstance(value, tuple) and is_sizes(list(value[: MAX_DIMS + 1]))


def _refuse(where: str) -> NoReturn:
    raise CheckpointCorruptError(f"{where} is not a plain tensor as torch.save writes it")
