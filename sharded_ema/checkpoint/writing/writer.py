"""A ``StorageWriter`` of torch.distributed.checkpoint that writes our format and commits.

The exchange between ranks is DCP's, and so is planning where its own planner is used; what
:mod:`.planning` has planned and kept is taken from there. The order of calls is DCP's as well:
``prepare_local_plan`` (all ranks), ``prepare_global_plan`` (coordinator: makes the temporary
directory), ``write_data`` (all ranks), ``finish`` (coordinator: checks, manifest, rename).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import (
    Metadata,
    SavePlan,
    SavePlanner,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sharded_ema.checkpoint.dtypes import safetensors_name
from sharded_ema.checkpoint.names import chunks_name, shard_name
from sharded_ema.checkpoint.reading.chunks import chunk_table_bytes, dump_chunk_table
from sharded_ema.checkpoint.reading.manifest import FileRecord
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES
from sharded_ema.checkpoint.safetensors import build_header, in_parts
from sharded_ema.checkpoint.writing.commit import (
    Commit,
    Place,
    Written,
    host_bytes,
    is_meta,
    meta_of,
)
from sharded_ema.checkpoint.writing.planning import ColumnPlanner
from sharded_ema.checkpoint.writing.rows import Geometry, Rows, in_order
from sharded_ema.checkpoint.writing.target import new_file
from sharded_ema.errors import CheckpointError, CheckpointWriteError


class SafetensorsStorageWriter(StorageWriter):
    """Writes one safetensors file per rank, a chunk table and a manifest.

    Use it with ``torch.distributed.checkpoint.save(state, storage_writer=...)``. Only tensors can
    be stored: an item that DCP would pickle is refused by name.

    Args:
        path: directory or URL that will be the checkpoint; it is one when the save is complete.
        replace: replace a checkpoint that is there.
        ranks: how many save, if that is known before; a save by another number is refused.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, replace: bool = False, ranks: int | None = None
    ) -> None:
        super().__init__()
        self._save = Commit(path, replace=replace, ranks=ranks)
        self._geometry: Geometry | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._save = self._save.again(checkpoint_id)

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
        place: Place = plan.storage_data
        rows = None
        if isinstance(planner, ColumnPlanner):
            self._geometry = planner.shared
        else:
            rows = Rows.of(plan.items).pack()
        written = _write_shard(in_order(plan.items), planner, place)
        future: Future[list[WriteResult]] = Future()
        future.set_result([dataclasses.replace(written, rows=rows)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [r for rank in results for r in rank if isinstance(r, WrittenShard)]
        geometry = self._geometry
        if geometry is None:
            geometry = Geometry.of(Rows.unpack(result.rows) for result in written if result.rows)
        files = [result.file for result in written]
        ids = np.cumsum([file is not None for file in files]) - 1
        columns = geometry.columns(
            ids.tolist(),
            [0 if file is None else file.header_bytes for file in files],
            np.frombuffer(b"".join(result.digests for result in written), np.uint8),
        )
        target = self._save.target
        assert target.directory is not None
        name, digest = chunks_name(target.mark), xxhash.xxh3_128()
        total = chunk_table_bytes(columns, target.uuid)
        with _as_write_error(target.directory, name), new_file(
            target.directory, name, total
        ) as write:  # fmt: skip
            for part in dump_chunk_table(columns, target.uuid):
                digest.update(part)
                write(part)
        record = FileRecord(name, total, digest.hexdigest())
        self._save.commit("safetensors", written, geometry.tensors, record)

    def abandon(self) -> None:
        """Remove what a failed save has written, on the rank that made the directory."""
        self._save.target.abandon()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


@dataclass(frozen=True)
class WrittenShard(Written):
    """The file of one rank.

    Attributes:
        digests: of its blocks, one after the other, as they lie in it.
        rows: packed :class:`Rows`, if the coordinator has no plan that says what it wrote.
    """

    digests: bytes = b""
    rows: bytes | None = None


def _write_shard(items: Sequence[WriteItem], planner: SavePlanner, place: Place) -> WrittenShard:
    """Write one rank's items as a safetensors file, hashing from memory, and make it durable."""
    file_name = shard_name(place.position, place.mark)
    index = MetadataIndex(file_name)
    if not items:
        return WrittenShard(index, 0, None)
    tensors = [planner.resolve_data(item) for item in items]
    counts: dict[str, int] = {}
    described = []
    for item, tensor in zip(items, tensors, strict=True):
        assert isinstance(tensor, Tensor) and item.tensor_data is not None
        assert tensor.dtype is item.tensor_data.properties.dtype
        number = counts[item.index.fqn] = counts.get(item.index.fqn, -1) + 1
        name = safetensors_name(tensor.dtype, item.index.fqn)
        parts = in_parts(name, tuple(tensor.shape))
        described.append((f"{item.index.fqn}@{number}", *parts))
    header, entries = build_header(described, {"format": "pt", "uuid": place.uuid})
    total = len(header) + entries[-1].stop
    whole = xxhash.xxh3_128(header)
    digests: list[bytes] = []
    metas: dict[str, bytes] = {}
    with _as_write_error(place.directory, file_name), new_file(
        place.directory, file_name, total
    ) as write:  # fmt: skip
        write(memoryview(header))
        for item, tensor in zip(items, tensors, strict=True):
            data = host_bytes(tensor)
            own = xxhash.xxh3_128()
            for start in range(0, data.nbytes, BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                own.update(block)  # from memory, before the write, and while it is in cache
                whole.update(block)
                write(memoryview(block))
            digests.append(own.digest())
            if is_meta(item):
                metas[item.index.fqn] = meta_of(data)
    record = FileRecord(file_name, total, whole.hexdigest(), len(header), _hex(header))
    return WrittenShard(index, total, None, record, metas, b"".join(digests))


@contextmanager
def _as_write_error(directory: str, name: str) -> Iterator[None]:
    """What goes wrong with a file becomes one error that names it."""
    try:
        yield
    except CheckpointWriteError:
        raise
    except (OSError, CheckpointError) as error:
        raise CheckpointWriteError(f"cannot write {directory}/{name}: {error}") from error


def _hex(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))
