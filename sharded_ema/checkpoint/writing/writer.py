"""A ``StorageWriter`` of torch.distributed.checkpoint that writes our format and commits.

Planning, de-duplication and the exchange between ranks are DCP's. The order of calls is its own:
``prepare_local_plan`` (all ranks), ``prepare_global_plan`` (coordinator: makes the temporary
directory), ``write_data`` (all ranks), ``finish`` (coordinator: checks, manifest, rename).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import xxhash
from torch import Tensor
from torch.distributed.checkpoint import (
    Metadata,
    SavePlan,
    SavePlanner,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sharded_ema.checkpoint.dtypes import safetensors_name
from sharded_ema.checkpoint.names import chunks_name, shard_name
from sharded_ema.checkpoint.reading.chunks import Chunk, write_chunk_table
from sharded_ema.checkpoint.reading.manifest import FileRecord, TensorRecord
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES
from sharded_ema.checkpoint.safetensors import build_header, in_parts
from sharded_ema.checkpoint.writing.commit import (
    Commit,
    Place,
    Written,
    files_of,
    host_bytes,
    is_meta,
)
from sharded_ema.checkpoint.writing.target import new_file
from sharded_ema.errors import CheckpointError, CheckpointWriteError
from sharded_ema.model.layout import Box


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
        items = [item for item in plan.items if _numel(item)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(list(_write_shard(items, planner, place)) if items else [])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [r for rank in results for r in rank if isinstance(r, Written)]
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
        file_ids = {name: i for i, name in enumerate(files_of(written))}
        table = write_chunk_table(rows, file_ids, self._save.target.uuid)
        name = chunks_name(self._save.target.mark)
        self._save.target.write(name, table)
        record = FileRecord(name, len(table), _hex(table))
        self._save.commit("safetensors", written, tensors, record)

    def abandon(self) -> None:
        """Remove what a failed save has written, on the rank that made the directory."""
        self._save.target.abandon()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _write_shard(items: Sequence[WriteItem], planner: SavePlanner, place: Place) -> list[Written]:
    """Write one rank's items as a safetensors file, hashing from memory, and make it durable."""
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
        parts = in_parts(name, tuple(tensor.shape))  # type: ignore[union-attr]
        described.append((f"{item.index.fqn}@{number}", *parts))
    header, entries = build_header(described, {"format": "pt", "uuid": place.uuid})
    file_name = shard_name(place.position, place.mark)
    total = len(header) + entries[-1].stop
    whole = xxhash.xxh3_128(header)
    written: list[Written] = []
    try:
        with new_file(place.directory, file_name, total) as write:
            write(memoryview(header))
            for item, tensor, entry in zip(items, tensors, entries, strict=True):
                data = host_bytes(tensor)
                own = xxhash.xxh3_128()
                for start in range(0, data.nbytes, BLOCK_BYTES):
                    block = data[start : start + BLOCK_BYTES]
                    own.update(block)  # from memory, before the write, and while it is in cache
                    whole.update(block)
                    write(memoryview(block))
                assert item.tensor_data is not None
                piece = item.tensor_data.chunk
                box = Box(tuple(piece.offsets), tuple(piece.sizes))
                offset = len(header) + entry.start
                chunk = Chunk(box, file_name, offset, data.nbytes, own.digest())
                meta = data.tobytes() if is_meta(item) else None
                written.append(Written(item.index, data.nbytes, None, chunk=chunk, meta=meta))
    except CheckpointWriteError:
        raise
    except (OSError, CheckpointError) as error:
        raise CheckpointWriteError(
            f"cannot write {place.directory}/{file_name}: {error}"
        ) from error
    record = FileRecord(file_name, total, whole.hexdigest(), len(header), _hex(header))
    return [dataclasses.replace(result, file=record) for result in written]


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
