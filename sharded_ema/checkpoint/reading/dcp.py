"""Checkpoints in torch.distributed.checkpoint's own format, read without running their code.

``.metadata`` is a pickle. It is parsed with an allow-list: the classes of torch that may occur are
mapped to inert records here or to immutable builtins, and anything else is refused. The tensors lie
in ``.distcp`` files, each one a ``torch.save`` archive (see :mod:`.torch_entry`).
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.torch_entry import (
    DTYPE_NAMES,
    UNPICKLING_ERRORS,
    is_shape,
    locate,
)
from sharded_ema.errors import CheckpointCorruptError, CheckpointUncommittedError
from sharded_ema.layout import Box, Shape

METADATA_NAME = ".metadata"

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"
_DTYPE = re.compile(r"(bfloat|float|complex|u?int|qu?int|bits|bool)[0-9a-z_]*")


class _Record:
    """An object of the pickle: its fields and nothing else."""

    __slots__ = ("fields",)

    def __init__(self, *arguments: Any) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        # Its presence also keeps a pickle from setting attributes on this class.
        self.fields = state if isinstance(state, dict) else {"state": state}


class _Metadata(_Record):
    __slots__ = ()


class _TensorStorage(_Record):
    __slots__ = ()


class _BytesStorage(_Record):
    __slots__ = ()


class _Chunk(_Record):
    __slots__ = ()


class _Properties(_Record):
    __slots__ = ()


class _StorageInfo(_Record):
    __slots__ = ()


class _Index(_Record):
    """A key of the table of storage: name and offset of a chunk."""

    __slots__ = ("key",)

    def __setstate__(self, state: Any) -> None:
        name, offset = state["fqn"], state.get("offset")
        if not isinstance(name, str) or not (offset is None or is_shape(offset)):
            raise pickle.UnpicklingError("a malformed index of a chunk")
        self.key: tuple[str, Shape | None] = (name, offset)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and self.key == other.key


# Only classes of this module and immutable builtins: a pickle can call what it names, and set
# attributes on it.
_ALLOWED: dict[tuple[str, str], Any] = {
    (_METADATA_MODULE, "Metadata"): _Metadata,
    (_METADATA_MODULE, "TensorStorageMetadata"): _TensorStorage,
    (_METADATA_MODULE, "BytesStorageMetadata"): _BytesStorage,
    (_METADATA_MODULE, "ChunkStorageMetadata"): _Chunk,
    (_METADATA_MODULE, "TensorProperties"): _Properties,
    (_METADATA_MODULE, "MetadataIndex"): _Index,
    (_METADATA_MODULE, "StorageMeta"): _Record,
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"): int,
    (_STORAGE_MODULE, "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    **{("pathlib", name): _Record for name in ("PosixPath", "PurePosixPath", "WindowsPath")},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib."):  # its private parts in Python 3.13
            module = "pathlib"
        if module == "torch" and _DTYPE.fullmatch(name):
            return name
        found = _ALLOWED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names the forbidden global {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names a persistent object")


@dataclass(frozen=True, slots=True)
class _Location:
    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: Shape
    dtype: str
    locations: list[_Location]


class DcpIndex:
    """What a DCP checkpoint holds, from its ``.metadata`` alone.

    Args:
        root: directory of the checkpoint.

    Attributes:
        tensors: ``(shape, dtype)`` by key; values that were pickled are left out.
        unsupported: torch dtype by key of tensors that this library does not read.

    Raises:
        CheckpointCorruptError: not readable, or a class in it that does not belong there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tensors: dict[str, _Tensor] = {}
        self.unsupported: dict[str, str] = {}
        path = root / METADATA_NAME
        try:
            with open(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
            self._take(metadata)
        except UNPICKLING_ERRORS as error:
            raise CheckpointCorruptError(f"{path} cannot be read: {error}") from None

    @property
    def tensors(self) -> dict[str, tuple[Shape, str]]:
        return {key: (tensor.shape, tensor.dtype) for key, tensor in self._tensors.items()}

    def files(self, key: str) -> set[str]:
        """Names of the files that hold a tensor, as ``.metadata`` gives them, unchecked."""
        return {location.file for location in self._tensors[key].locations}

    def chunks(self, key: str) -> list[Chunk]:
        """Locate the data of a tensor; reads the tail of each of its entries.

        Raises:
            CheckpointCorruptError: an entry is not there, or is not what ``.metadata`` says.
        """
        tensor = self._tensors[key]
        found = []
        for location in tensor.locations:
            where = f"{key} at {location.box.offsets} in {self._root / location.file}"
            try:
                descriptor = os.open(self._root / location.file, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise CheckpointCorruptError(f"{where}: the file is missing") from None
            try:
                entry = locate(descriptor, location.offset, location.length, where)
            finally:
                os.close(descriptor)
            if entry.shape != location.box.sizes or entry.dtype != tensor.dtype:
                raise CheckpointCorruptError(
                    f"{where} is {entry.dtype} of shape {entry.shape}, .metadata says "
                    f"{tensor.dtype} of shape {location.box.sizes}"
                )
            found.append(
                Chunk(
                    box=location.box,
                    file=location.file,
                    byte_offset=entry.byte_offset,
                    num_bytes=entry.num_bytes,
                    digest=None,
                    crc32=entry.crc32,
                    strides=entry.strides,
                )
            )
        return found

    def _take(self, metadata: Any) -> None:
        if not isinstance(metadata, _Metadata):
            raise ValueError("it describes no checkpoint")
        storage = metadata.fields["storage_data"]
        if storage is None:
            raise CheckpointUncommittedError(f"{self._root} has a .metadata without storage")
        for key, value in metadata.fields["state_dict_metadata"].items():
            if not isinstance(value, _TensorStorage):
                continue
            shape, dtype = value.fields["size"], value.fields["properties"].fields["state"][0]
            if not isinstance(key, str) or not is_shape(shape):
                raise ValueError(f"the shape of {key!r:.80} is {shape!r:.80}")
            if dtype not in DTYPE_NAMES:
                self.unsupported[key] = str(dtype)
                continue
            locations = list(self._locations(key, value.fields["chunks"], storage))
            self._tensors[key] = _Tensor(shape, DTYPE_NAMES[dtype], locations)

    def _locations(self, key: str, chunks: Any, storage: Any) -> Iterator[_Location]:
        for chunk in chunks:
            box = Box(chunk.fields["offsets"], chunk.fields["sizes"])
            if not is_shape(box.offsets) or not is_shape(box.sizes):
                raise ValueError(f"{key!r} has a chunk at {box.offsets!r:.80}")
            if not box.numel:
                continue
            index = _Index()
            index.__setstate__({"fqn": key, "offset": box.offsets})
            info = storage[index].fields
            if info.get("transform_descriptors"):
                raise ValueError(f"{key!r} went through a transformation that is not supported")
            name, offset, length = (info[k] for k in ("relative_path", "offset", "length"))
            if not isinstance(name, str) or not is_shape((offset, length)):
                raise ValueError(f"{key!r} has a malformed place of storage")
            yield _Location(box, name, offset, length)
