"""``StorageWriter``s of torch.distributed.checkpoint that write our format, or DCP's, and commit.

Planning, de-duplication and the exchange between ranks are DCP's. The order of calls is its own:
``prepare_local_plan`` (all ranks), ``prepare_global_plan`` (coordinator: makes the temporary
directory), ``write_data`` (all ranks), ``finish`` (coordinator: checks, manifest, rename).
"""

from __future__ import annotations

import dataclasses
import os
import platform
import uuid as uuid_module
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import (
    FileSystemWriter,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sharded_ema.checkpoint import commit
from sharded_ema.checkpoint.dtypes import safetensors_name
from sharded_ema.checkpoint.reading.catalog import is_meta_key
from sharded_ema.checkpoint.reading.chunks import Chunk, write_chunk_table
from sharded_ema.checkpoint.reading.manifest import (
    CHUNKS_NAME,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    TensorRecord,
    decode_meta,
    dump_manifest,
)
from sharded_ema.checkpoint.reading.safetensors_file import build_header
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES
from sharded_ema.config import META_KEY
from sharded_ema.errors import CheckpointWriteError
from sharded_ema.layout import Box
from sharded_ema.version import __version__


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank writes: directory of the save, its uuid, and this rank's position."""

    directory: str
    uuid: str
    position: int
    inner: Any = None


@dataclass(frozen=True)
class _Written(WriteResult):
    """A written item with what the manifest needs to know of it and of its file."""

    chunk: Chunk | None = None
    file: FileRecord | None = None
    meta: bytes | None = None


class _Committing:
    """Paths, uuid and commit that both writers share; lives on every rank."""

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        self.target = Path(path)
        self.replace = replace
        self.world_size = 1
        self.staging: Path | None = None

    def begin(self, plans: list[SavePlan]) -> list[SavePlan]:
        uuid = uuid_module.uuid4().hex
        self.staging = commit.begin(self.target, uuid, replace=self.replace)
        self.world_size = len(plans)
        return [
            dataclasses.replace(
                plan, storage_data=_Place(str(self.staging), uuid, i, plan.storage_data)
            )
            for i, plan in enumerate(plans)
        ]

    def commit(self, manifest: Manifest) -> None:
        assert self.staging is not None
        commit.write_durably(self.staging / MANIFEST_NAME, dump_manifest(manifest))
        commit.publish(self.staging, self.target, replace=self.replace)
        self.staging = None

    def abandon(self) -> None:
        """Remove the temporary directory of a save that failed; harmless after a commit."""
        if self.staging is not None:
            commit.abandon(self.staging)
            self.staging = None


class SafetensorsStorageWriter(StorageWriter):
    """Writes one safetensors file per rank, a chunk table and a manifest.

    Use it with ``torch.distributed.checkpoint.save(state, storage_writer=...)``. Only tensors can
    be stored: an item that DCP would pickle is refused by name.

    Args:
        path: directory that will be the checkpoint; it appears when the save is complete.
        replace: replace a checkpoint that is there.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        super().__init__()
        self._save = _Committing(path, replace=replace)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._save = _Committing(checkpoint_id, replace=self._save.replace)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO:
                raise CheckpointWriteError(
                    f"{item.index.fqn} is not a tensor and would have to be pickled; this format "
                    "stores tensors only, so keep such values in a file of their own"
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return self._save.begin(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        place: _Place = plan.storage_data
        items = [item for item in plan.items if _numel(item)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(list(_write_shard(items, planner, place)) if items else [])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._save.staging is not None
        uuid = self._save.staging.name.rpartition("-")[2]
        written = [r for rank in results for r in rank if isinstance(r, _Written)]
        files = {r.file.name: r.file for r in written if r.file is not None}
        chunks: dict[str, list[Chunk]] = {}
        for result in written:
            if result.chunk is not None:
                chunks.setdefault(result.index.fqn, []).append(result.chunk)
        tensors: list[TensorRecord] = []
        rows: list[tuple[int, Chunk]] = []
        for key, stored in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(stored, TensorStorageMetadata)
            mine = sorted(chunks.get(key, []), key=lambda c: c.box.offsets)
            _check_coverage(key, stored, mine)
            name = safetensors_name(stored.properties.dtype, key)
            tensors.append(TensorRecord(key, tuple(stored.size), name, len(rows), len(mine)))
            rows += [(len(tensors) - 1, chunk) for chunk in mine]
        table = write_chunk_table(rows, {name: i for i, name in enumerate(files)}, uuid)
        commit.write_durably(self._save.staging / CHUNKS_NAME, table)
        records = [*files.values(), FileRecord(CHUNKS_NAME, len(table), _hex(table))]
        self._save.commit(
            Manifest(
                format="safetensors",
                uuid=uuid,
                emas=_read_metas(written),
                tensors=tuple(tensors),
                files=tuple(records),
                world_size=self._save.world_size,
                libraries=libraries(),
            )
        )

    def abandon(self) -> None:
        """Remove what a failed save has written, on the rank that made the directory."""
        self._save.abandon()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class StockStorageWriter(FileSystemWriter):
    """DCP's own file format with our commit, and a manifest beside ``.metadata``.

    What it writes can be loaded with ``torch.distributed.checkpoint.load`` where this library is
    not installed.

    Args:
        path: directory that will be the checkpoint.
        replace: replace a checkpoint that is there.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        super().__init__(path, thread_count=1, sync_files=True)
        self._save = _Committing(path, replace=replace)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the base class would create the target directory here

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return self._save.begin(super().prepare_global_plan(plans))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        place: _Place = plan.storage_data
        self.path = Path(place.directory)
        plan = dataclasses.replace(plan, storage_data=place.inner)
        # Without items the base class would leave an empty file that no manifest lists.
        results = super().write_data(plan, planner).wait() if plan.items else []
        digests: dict[str, FileRecord] = {}
        metas = {
            item.index: _host_bytes(planner.resolve_data(item)).tobytes()
            for item in plan.items
            if _is_meta(item)
        }
        extended: list[WriteResult] = []
        for result in results:
            name = result.storage_data.relative_path
            if name not in digests:
                digests[name] = _digest_file(self.path / name)
            extended.append(
                _Written(
                    result.index,
                    result.size_in_bytes,
                    result.storage_data,
                    file=digests[name],
                    meta=metas.get(result.index),
                )
            )
        future: Future[list[WriteResult]] = Future()
        future.set_result(extended)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._save.staging is not None
        self.path = self._save.staging
        super().finish(metadata, results)
        written = [r for rank in results for r in rank if isinstance(r, _Written)]
        files = {r.file.name: r.file for r in written if r.file is not None}
        self._save.commit(
            Manifest(
                format="dcp",
                uuid=self.path.name.rpartition("-")[2],
                emas=_read_metas(written),
                tensors=tuple(
                    TensorRecord(
                        key,
                        tuple(stored.size),
                        safetensors_name(stored.properties.dtype, key),
                        0,
                        0,
                    )
                    for key, stored in sorted(metadata.state_dict_metadata.items())
                    if isinstance(stored, TensorStorageMetadata)
                ),
                files=(*files.values(), _digest_file(self.path / ".metadata", durable=True)),
                world_size=self._save.world_size,
                libraries=libraries(),
            )
        )

    def abandon(self) -> None:
        """Remove what a failed save has written, on the rank that made the directory."""
        self._save.abandon()


def libraries() -> dict[str, str]:
    """Versions that a reader of the manifest may want to know."""
    return {
        "sharded_ema": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _write_shard(items: Sequence[WriteItem], planner: SavePlanner, place: _Place) -> list[_Written]:
    """Write one rank's items as a safetensors file, hashing from memory, and fdatasync it."""
    tensors = [planner.resolve_data(item) for item in items]
    assert all(isinstance(t, Tensor) for t in tensors)
    # Back to back without holes, as safetensors wants it; wider types first keeps all aligned.
    order = sorted(range(len(items)), key=lambda i: -tensors[i].element_size())  # type: ignore
    items, tensors = [items[i] for i in order], [tensors[i] for i in order]
    counts: dict[str, int] = {}
    described = []
    for item, tensor in zip(items, tensors, strict=True):
        number = counts[item.index.fqn] = counts.get(item.index.fqn, -1) + 1
        name = safetensors_name(tensor.dtype, item.index.fqn)  # type: ignore[union-attr]
        described.append((f"{item.index.fqn}@{number}", name, tuple(tensor.shape)))  # type: ignore
    header, entries = build_header(described, {"format": "pt", "uuid": place.uuid})
    path = Path(place.directory) / f"shard-{place.position:05d}.safetensors"
    total = len(header) + entries[-1].stop
    whole = xxhash.xxh3_128(header)
    written: list[_Written] = []
    try:
        with open(path, "xb", buffering=0) as file:
            # Room first: a full disk is found before the work, and blocks need no allocation.
            os.posix_fallocate(file.fileno(), 0, total)
            _write_all(file.fileno(), memoryview(header))
            for item, tensor, entry in zip(items, tensors, entries, strict=True):
                data = _host_bytes(tensor)
                own = xxhash.xxh3_128()
                for start in range(0, data.nbytes, BLOCK_BYTES):
                    block = data[start : start + BLOCK_BYTES]
                    own.update(block)  # from memory, before the write, and while it is in cache
                    whole.update(block)
                    _write_all(file.fileno(), memoryview(block))
                assert item.tensor_data is not None
                piece = item.tensor_data.chunk
                box = Box(tuple(piece.offsets), tuple(piece.sizes))
                offset = len(header) + entry.start
                chunk = Chunk(box, path.name, offset, data.nbytes, own.digest())
                meta = data.tobytes() if _is_meta(item) else None
                written.append(_Written(item.index, data.nbytes, None, chunk=chunk, meta=meta))
            os.fdatasync(file.fileno())
    except OSError as error:
        raise CheckpointWriteError(f"cannot write {path}: {error}") from error
    record = FileRecord(path.name, total, whole.hexdigest(), len(header), _hex(header))
    return [dataclasses.replace(result, file=record) for result in written]


def _is_meta(item: WriteItem) -> bool:
    """Whether an item describes an average; a parameter may have the same name, but not uint8."""
    return (
        is_meta_key(item.index.fqn)
        and item.tensor_data is not None
        and len(item.tensor_data.size) == 1
        and item.tensor_data.properties.dtype is torch.uint8
    )


def _host_bytes(tensor: Any) -> Any:
    """The elements in C order as a numpy uint8 array; a view when they already lie so."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy()


def _write_all(descriptor: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(descriptor, data) :]


def _digest_file(path: Path, *, durable: bool = False) -> FileRecord:
    """Size and digest of a file already written, read back in blocks."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
        size = file.tell()
        if durable:
            os.fsync(file.fileno())
    return FileRecord(path.name, size, digest.hexdigest())


def _hex(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def _numel(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel()


def _check_coverage(key: str, stored: TensorStorageMetadata, chunks: Sequence[Chunk]) -> None:
    """Refuse to commit a tensor with holes. That chunks are disjoint, DCP's planner has checked."""
    volume = sum(chunk.box.numel for chunk in chunks)
    outside = [c.box for c in chunks if not c.box.fits(stored.size)]
    if volume != stored.size.numel() or outside:
        raise CheckpointWriteError(
            f"{key}: the ranks wrote {volume} of {stored.size.numel()} elements"
            f"{f', {outside[0]} lies outside' if outside else ''}; nothing was committed"
        )


def _read_metas(written: Sequence[_Written]) -> dict[str, dict[str, Any]]:
    """What the averages in this save say of themselves, by the prefix of their keys."""
    return {
        r.index.fqn.removesuffix(META_KEY): decode_meta(r.meta, r.index.fqn)
        for r in written
        if r.meta is not None
    }
