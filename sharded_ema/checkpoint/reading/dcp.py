"""Checkpoints in torch.distributed.checkpoint's own format, read without running their code.

``.metadata`` is a pickle, which is taken apart (see :mod:`.pickles`) and never loaded; a global
that does not belong there is refused. The tensors lie in ``.distcp`` files, each one a
``torch.save`` archive (see :mod:`.torch_entry`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

from sharded_ema.checkpoint.files import Directory, inside, read_whole
from sharded_ema.checkpoint.names import METADATA_NAME
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.pickles import MEMBER, Global, Note, refuse, take_apart
from sharded_ema.checkpoint.reading.torch_entry import DTYPE_NAMES, is_shape, locate
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointUncommittedError,
)
from sharded_ema.model.layout import Box, Shape

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"
_DTYPE = re.compile(r"(bfloat|float|complex|u?int|qu?int|bits|bool)[0-9a-z_]*")
# Five times that of a 70B model on 512 ranks.
_MAX_METADATA_BYTES = 1 << 28

_METADATA = Global(_METADATA_MODULE, "Metadata")
_TENSOR = Global(_METADATA_MODULE, "TensorStorageMetadata")
_VALUE = Global(_METADATA_MODULE, "BytesStorageMetadata")
_CHUNK = Global(_METADATA_MODULE, "ChunkStorageMetadata")
_PROPERTIES = Global(_METADATA_MODULE, "TensorProperties")
_INDEX = Global(_METADATA_MODULE, "MetadataIndex")
_STORAGE_INFO = Global(_STORAGE_MODULE, "_StorageInfo")
_SIZE = Global("torch", "Size")
_KNOWN = {
    _METADATA, _TENSOR, _VALUE, _CHUNK, _PROPERTIES, _INDEX, _STORAGE_INFO, _SIZE,
    Global(_METADATA_MODULE, "StorageMeta"),
    Global(_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    Global("torch.serialization", "_get_layout"),
    Global("collections", "OrderedDict"), MEMBER,
}  # fmt: skip
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath")


def _allowed(found: Global) -> bool:
    if found.module.split(".")[0] == "pathlib":  # its private parts in Python 3.13
        return found.name in _PATHS
    return found in _KNOWN or (found.module == "torch" and bool(_DTYPE.fullmatch(found.name)))


@dataclass(frozen=True, slots=True)
class StoredAt:
    """Where an entry lies: bytes ``offset`` to ``offset + length`` of ``file``.

    Attributes:
        box: of the chunk that the entry holds; ``None`` for a pickled value.
    """

    box: Box | None
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: Shape
    dtype: str
    locations: list[StoredAt]


class DcpIndex:
    """What a DCP checkpoint holds, from its ``.metadata`` alone.

    Args:
        directory: of the checkpoint.
        listed: files that a manifest lists, where there is one; tensors lie in no others.

    Attributes:
        values: places of what was pickled, by key; never read as values.
        unsupported: see :class:`~sharded_ema.checkpoint.reading.chunks.Index`.

    Raises:
        CheckpointCorruptError: not readable, or a class in it that does not belong there.
    """

    format = "dcp"

    def __init__(self, directory: Directory, listed: Set[str] | None = None) -> None:
        self._directory = directory
        self._listed = listed
        self._root = directory.location
        self._path = self._root / METADATA_NAME
        self._tensors: dict[str, _Tensor] = {}
        self.values: dict[str, StoredAt] = {}
        self.unsupported: dict[str, tuple[Shape, str]] = {}
        data = read_whole(directory / METADATA_NAME, _MAX_METADATA_BYTES)
        # Chunks may be shared by many tensors in a forged pickle; a true one has bytes for each.
        self._chunks_left = len(data)
        self._take(take_apart(data, _allowed, str(self._path)))

    @property
    def tensors(self) -> Mapping[str, tuple[Shape, str]]:
        """Shape and dtype by key; values that were pickled are left out."""
        return {key: (tensor.shape, tensor.dtype) for key, tensor in self._tensors.items()}

    def entries(self) -> dict[str, list[tuple[int, int, str]]]:
        """All entries by file, as ``(offset, length, key)`` in the order of the file."""
        found: dict[str, list[tuple[int, int, str]]] = {}
        places = [(key, at) for key, tensor in self._tensors.items() for at in tensor.locations]
        for key, at in [*places, *self.values.items()]:
            found.setdefault(at.file, []).append((at.offset, at.length, key))
        return {name: sorted(entries) for name, entries in sorted(found.items())}

    def locations(self, key: str) -> list[StoredAt]:
        """The entries that hold a tensor, as ``.metadata`` gives them, unchecked."""
        return self._tensors[key].locations

    def chunks(self, key: str) -> list[Chunk]:
        """Locate the data of a tensor; reads the tail of each of its entries.

        Raises:
            CheckpointCorruptError: an entry is not there, or is not what ``.metadata`` says.
        """
        return [self.chunk(key, at) for at in self._tensors[key].locations]

    def chunk(self, key: str, location: StoredAt) -> Chunk:
        """The same of one of :meth:`locations`.

        Raises:
            CheckpointCorruptError: see :meth:`chunks`.
        """
        if self._listed is not None and location.file not in self._listed:
            raise CheckpointCorruptError(
                f"{self._root}: {key} lies in {location.file}, which is not listed"
            )
        dtype, box = self._tensors[key].dtype, location.box
        assert box is not None
        where = f"{key} at {box.offsets} in {self._root / location.file}"
        with ExitStack() as stack:
            try:
                inside(self._root, location.file)
                file = stack.enter_context(self._directory.open(location.file))
            except CheckpointError as error:
                raise type(error)(f"{where}: {error}") from None
            entry = locate(file, location.offset, location.length, where)
        if entry.shape != box.sizes or entry.dtype != dtype:
            refuse(
                where,
                f"it is {entry.dtype} of shape {entry.shape}, .metadata says {dtype} of shape "
                f"{box.sizes}",
            )
        return Chunk(
            box=box,
            file=location.file,
            byte_offset=entry.byte_offset,
            num_bytes=entry.num_bytes,
            digest=None,
            crc32=entry.crc32,
            strides=entry.strides,
        )

    def _take(self, metadata: Any) -> None:
        fields = self._fields(metadata, _METADATA)
        if fields.get("storage_data") is None:
            raise CheckpointUncommittedError(f"{self._root} has a .metadata without storage")
        storage = self._storage(self._dict(fields["storage_data"]))
        for key, value in self._dict(fields.get("state_dict_metadata")).items():
            if not isinstance(key, str) or not isinstance(value, Note):
                self._refuse("an item is described by what is no description")
            if value.of == _TENSOR:
                self._take_tensor(key, self._fields(value, _TENSOR), storage)
            elif (key, None) in storage:
                self.values[key] = self._location(None, storage[key, None])

    def _take_tensor(
        self, key: str, fields: dict[str, Any], storage: dict[tuple[str, Shape | None], Any]
    ) -> None:
        shape, chunks = self._shape(fields.get("size")), fields.get("chunks")
        properties = fields.get("properties")
        if not isinstance(properties, Note) or properties.of != _PROPERTIES:
            self._refuse(f"{key} has no properties")
        state = properties.state
        dtype = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(dtype, Global) or not isinstance(chunks, list):
            self._refuse(f"the properties of {key} are malformed")
        if dtype.name not in DTYPE_NAMES:
            self.unsupported[key] = shape, dtype.name
            return
        locations = list(self._locations(key, chunks, storage))
        self._tensors[key] = _Tensor(shape, DTYPE_NAMES[dtype.name], locations)

    def _storage(self, stored: dict[Any, Any]) -> dict[tuple[str, Shape | None], Any]:
        """The table of storage by name and offset of a chunk."""
        found: dict[tuple[str, Shape | None], Any] = {}
        for index, info in stored.items():
            fields = self._fields(index, _INDEX)
            name, offset = fields.get("fqn"), fields.get("offset")
            if not isinstance(name, str):
                self._refuse("it has an index without a name")
            found[name, None if offset is None else self._shape(offset)] = info
        return found

    def _locations(
        self, key: str, chunks: list[Any], storage: dict[tuple[str, Shape | None], Any]
    ) -> Iterator[StoredAt]:
        for chunk in chunks:
            self._chunks_left -= 1
            if self._chunks_left < 0:
                self._refuse("it lists more chunks than it has bytes")
            fields = self._fields(chunk, _CHUNK)
            offsets, sizes = self._shape(fields.get("offsets")), self._shape(fields.get("sizes"))
            if len(offsets) != len(sizes):
                self._refuse(f"a chunk of {key} has offsets and sizes of different length")
            box = Box(offsets, sizes)
            if not box.numel:
                continue
            # Taken out, because no two chunks lie at one place.
            info = storage.pop((key, offsets), None)
            if info is None:
                self._refuse(f"the chunk of {key} at {offsets} has no place, or two")
            yield self._location(box, info)

    def _location(self, box: Box | None, info: Any) -> StoredAt:
        fields = self._fields(info, _STORAGE_INFO)
        if fields.get("transform_descriptors"):
            self._refuse("an entry went through a transformation that is not supported")
        name, offset, length = (fields.get(name) for name in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not is_shape((offset, length)):
            self._refuse("an entry has a malformed place")
        return StoredAt(box, name, offset, length)  # type: ignore[arg-type]

    def _shape(self, value: Any) -> Shape:
        """A ``torch.Size``, or the tuple that it is made of."""
        if isinstance(value, Note) and value.of == _SIZE and len(value.arguments) == 1:
            value = value.arguments[0]
        if not is_shape(value):
            self._refuse("a shape is no tuple of sizes")
        shape: Shape = value
        return shape

    def _fields(self, value: Any, of: Global) -> dict[str, Any]:
        if not isinstance(value, Note) or value.of != of or not isinstance(value.state, dict):
            self._refuse(f"there is no {of.name} where one should be")
        fields: dict[str, Any] = value.state
        return fields

    def _dict(self, value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            self._refuse("a table is missing")
        return value

    def _refuse(self, what: str) -> NoReturn:
        refuse(str(self._path), what)
