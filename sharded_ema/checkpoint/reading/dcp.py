"""Reads PyTorch's own distributed checkpoints without PyTorch and without running their pickles.

``.metadata`` and the head of every stored tensor are pickles, which can run any code when loaded. The
unpicklers here know the few classes that a checkpoint consists of, as inert stand-ins, and
refuse everything else by name. Tensor data is found by its zip record, whose CRC-32 PyTorch
writes but never checks.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.safetensors_file import ITEMSIZE
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.layout import Box, Shape, c_strides

METADATA_NAME = ".metadata"
_TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_MAX_RECORDS = 64  # in the zip of one tensor
_MAX_PICKLE = 1 << 20  # of one tensor's head
_END, _CENTRAL, _LOCAL = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"


class _Stub:
    """Stands in for a class of torch; holds what the pickle gives it and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Index(_Stub):
    """``MetadataIndex``: the key of the storage table."""

    fqn: str = ""
    offset: Any = None

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and (self.fqn, self.offset) == (other.fqn, other.offset)


def _as_tuple(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _nothing(*args: Any) -> None:
    return None


_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (_METADATA, name): type(name, (_Stub,), {})
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta",
        )
    },
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _nothing,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): type("_StorageInfo", (_Stub,), {}),
    ("torch", "Size"): _as_tuple,
    ("torch", "device"): _nothing,
    ("torch.serialization", "_get_layout"): _nothing,
    ("collections", "OrderedDict"): dict,
    **{("pathlib", name): _nothing for name in ("PosixPath", "WindowsPath", "PurePosixPath")},
    **{("torch", name): code for name, code in _TORCH_DTYPES.items()},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # From Python 3.13 on, paths say that they come from pathlib._local.
        home = "pathlib" if module.startswith("pathlib.") else module
        if (home, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return _ALLOWED[home, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside itself")


class _HeadUnpickler(pickle.Unpickler):
    """The pickle in front of a tensor's data, of which only the shape matters."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and (name.endswith("Storage") or name in _TORCH_DTYPES):
            return name
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _unpickle(unpickler: type[pickle.Unpickler], data: bytes, where: str) -> Any:
    try:
        return unpickler(io.BytesIO(data)).load()
    except (
        pickle.UnpicklingError, ValueError, TypeError, AttributeError, KeyError, IndexError,
        EOFError, MemoryError, RecursionError, OverflowError, UnicodeDecodeError,
    ) as error:  # fmt: skip
        raise CheckpointCorruptError(f"{where} is refused: {error}; nothing in it was run") from error


class StockCheckpoint:
    """An open DCP directory.

    Attributes:
        tensors: shape and safetensors dtype by key. Pickled items are left out.

    Raises:
        CheckpointCorruptError: the metadata is no metadata, or wants to run something.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        where = str(path / METADATA_NAME)
        metadata = _unpickle(_MetadataUnpickler, (path / METADATA_NAME).read_bytes(), where)
        self.tensors: dict[str, tuple[Shape, str]] = {}
        self._boxes: dict[str, list[Box]] = {}
        self._places: dict[tuple[str, Shape], Any] = {}
        try:
            for key, stored in metadata.state_dict_metadata.items():
                if hasattr(stored, "chunks"):
                    shape = _shape(stored.size)
                    self.tensors[key] = (shape, stored.properties.state[0])
                    self._boxes[key] = [Box(_shape(c.offsets), _shape(c.sizes)) for c in stored.chunks]
            for index, info in metadata.storage_data.items():
                ndim = len(self.tensors[index.fqn][0]) if index.fqn in self.tensors else 0
                offset = (0,) * ndim if index.offset is None else _shape(index.offset)
                self._places[index.fqn, offset] = info
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise CheckpointCorruptError(f"{where} does not describe tensors: {error!r}") from error

    def chunks(self, key: str) -> list[Chunk]:
        """Where the blocks of a tensor lie; reads the head of each block."""
        found = []
        for box in self._boxes[key]:
            if not box.numel:
                continue
            info = self._places.get((key, box.offsets))
            if info is None:
                raise CheckpointCorruptError(f"{key}: no data is recorded for its block at {box}")
            found.append(self._locate(key, box, info))
        return found

    def _locate(self, key: str, box: Box, info: Any) -> Chunk:
        name, offset, length = info.relative_path, info.offset, info.length
        if not isinstance(name, str) or len(PurePosixPath(name).parts) != 1 or name in ("..", "."):
            raise CheckpointCorruptError(f"{key}: {name!r} is no file of this directory")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointCorruptError(f"{key}: {name} was transformed on writing; not supported")
        where = f"{self._path / name}, {key}"
        itemsize = ITEMSIZE[self.tensors[key][1]]
        with open(self._path / name, "rb") as file:
            records = _zip_records(file.fileno(), offset, length, where)
            head_at, head_size, head_crc = records.get("data.pkl", (0, 0, 0))
            if not 0 < head_size <= _MAX_PICKLE:
                raise CheckpointCorruptError(f"{where}: no tensor begins at byte {offset}")
            head = os.pread(file.fileno(), head_size, head_at)
        if zlib.crc32(head) != head_crc:
            raise CheckpointCorruptError(f"{where}: CRC-32 mismatch in the head at byte {head_at}")
        try:
            storage, skip, size, strides = _unpickle(_HeadUnpickler, head, where)
            data_at, data_size, crc = records[f"data/{storage[2]}"]
            sizes, steps = _shape(size), _shape(strides)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise CheckpointCorruptError(f"{where}: not a plain tensor: {error!r}") from error
        span = 1 + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
        if sizes != box.sizes or skip or span * itemsize > data_size:
            raise CheckpointCorruptError(f"{where}: holds {sizes}, the metadata says {box.sizes}")
        plain = all(n == 1 or s == c for n, s, c in zip(sizes, steps, c_strides(sizes), strict=True))
        if plain and data_size != box.numel * itemsize:
            raise CheckpointCorruptError(f"{where}: {data_size} bytes of data for {box}")
        # torch.serialization can be told to write no checksum; the field is then 0.
        return Chunk(box, name, data_at, data_size, None, crc or None, None if plain else steps)


def _shape(values: Any) -> Shape:
    shape = tuple(values)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in shape) or len(shape) > 64:
        raise ValueError(f"{shape!r} is no shape")
    return shape


Records = dict[str, tuple[int, int, int]]


def _zip_records(descriptor: int, offset: int, length: int, where: str) -> Records:
    """Position, size and CRC-32 of each record of an uncompressed zip inside a file."""
    file_size = os.fstat(descriptor).st_size
    if not 0 <= offset <= offset + length <= file_size or type(offset) is not int:
        raise CheckpointCorruptError(f"{where}: bytes {offset}:{offset + length} of {file_size}")
    tail_size = min(length, 4096)
    tail = os.pread(descriptor, tail_size, offset + length - tail_size)
    end = tail.rfind(_END)
    try:
        if end < 0:
            raise CheckpointCorruptError(f"{where}: truncated, no end of zip at {offset + length}")
        _, size, start = struct.unpack_from("<HII", tail, end + 10)
        if start == 0xFFFFFFFF or size == 0xFFFFFFFF:  # zip64: its end record lies before
            (record,) = struct.unpack_from("<Q", tail, end - 12)
            wide = os.pread(descriptor, 56, offset + record)
            size, start = struct.unpack_from("<QQ", wide, 40)
        if size > _MAX_RECORDS * 512:
            raise CheckpointCorruptError(f"{where}: a directory of {size} bytes for one tensor")
        directory = os.pread(descriptor, size, offset + start)
        return _parse_directory(directory, _local_data(descriptor, offset, where), where)
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointCorruptError(f"{where}: unreadable zip directory: {error}") from error


def _parse_directory(data: bytes, locate: Callable[[int], int], where: str) -> Records:
    records: Records = {}
    position = 0
    while position < len(data):
        if data[position : position + 4] != _CENTRAL:
            raise CheckpointCorruptError(f"{where}: broken zip directory")
        (method,) = struct.unpack_from("<H", data, position + 10)
        crc, packed, size = struct.unpack_from("<III", data, position + 16)
        name_size, extra_size, comment_size = struct.unpack_from("<HHH", data, position + 28)
        (local,) = struct.unpack_from("<I", data, position + 42)
        name_at = position + 46
        name = data[name_at : name_at + name_size].decode()
        extra = data[name_at + name_size : name_at + name_size + extra_size]
        if 0xFFFFFFFF in (size, packed, local):
            size, local = _wide_fields(extra, size, packed, local)
        if method:
            raise CheckpointCorruptError(f"{where}: record {name} is compressed")
        records[name.partition("/")[2]] = (locate(local), size, crc)
        position = name_at + name_size + extra_size + comment_size
    return records


def _wide_fields(extra: bytes, size: int, packed: int, local: int) -> tuple[int, int]:
    """Sizes beyond 4 GiB stand in an extra field, in a fixed order, only those that need it."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            at = position + 4
            values = []
            for value in (size, packed, local):
                if value == 0xFFFFFFFF:
                    (value,) = struct.unpack_from("<Q", extra, at)
                    at += 8
                values.append(value)
            return values[0], values[2]
        position += 4 + length
    return size, local


def _local_data(descriptor: int, offset: int, where: str) -> Callable[[int], int]:
    """From the position of a local header to that of the data behind it."""

    def locate(local: int) -> int:
        header = os.pread(descriptor, 30, offset + local)
        if header[:4] != _LOCAL:
            raise CheckpointCorruptError(f"{where}: no zip record at byte {offset + local}")
        name_size, extra_size = struct.unpack_from("<HH", header, 26)
        return offset + local + 30 + int(name_size) + int(extra_size)

    return locate


