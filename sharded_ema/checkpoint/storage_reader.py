"""A ``StorageReader`` of torch.distributed.checkpoint for our format and for DCP's own.

It never unpickles: what it knows of a checkpoint comes from :mod:`.reading`, which has no torch,
and tensors are read as byte ranges. DCP plans which part of which chunk goes where, so a checkpoint
loads into any other sharding.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from sharded_ema.checkpoint.dtypes import TORCH_DTYPE
from sharded_ema.checkpoint.files import Directory, as_location, gone
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.errors import CheckpointCorruptError

# Bytes read at a time; a row of a tensor that is longer is read whole.
BLOCK_BYTES = 1 << 24


class SafetensorsStorageReader(StorageReader):
    """Reads a committed checkpoint of this library, in either of its formats.

    Use it with ``torch.distributed.checkpoint.load(state, storage_reader=...)``.

    Args:
        path: directory or URL of the checkpoint.
        verify: check the digest of every chunk, in DCP's format of the files that hold them,
            before anything is copied.

    Raises:
        CheckpointNotFoundError, CheckpointUncommittedError, CheckpointCorruptError: when the
            checkpoint is opened, which is at the first read.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False) -> None:
        super().__init__()
        self._path = as_location(path)
        self._verify = verify
        self._catalog: Checkpoint | None = None
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._path = as_location(checkpoint_id)
            self._catalog = self._metadata = None

    @property
    def catalog(self) -> Checkpoint:
        """What is in the checkpoint; opened on first use."""
        if self._catalog is None:
            self._catalog = open_checkpoint(self._path)
        return self._catalog

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = self._read_metadata()
        return self._metadata

    def _read_metadata(self) -> Metadata:
        stored = {}
        for key, tensor in self.catalog.tensors.items():
            stored[key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=TORCH_DTYPE[tensor.dtype]),
                size=torch.Size(tensor.shape),
                chunks=[
                    ChunkStorageMetadata(torch.Size(c.box.offsets), torch.Size(c.box.sizes))
                    for c in tensor.chunks()
                ],
            )
        return Metadata(state_dict_metadata=stored)  # type: ignore[arg-type]

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        manifest = self.catalog.manifest
        return dataclasses.replace(plan, storage_data=manifest.uuid if manifest else None)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        # Every rank has opened the checkpoint for itself.
        if len({plan.storage_data for plan in plans}) > 1:
            raise gone(self._path)
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with self.catalog as checkpoint, checkpoint.directory.unless_gone():
            chunks = self._chunks_of(plan)
            if self._verify:
                # Several items may read from one chunk.
                checkpoint.verify(
                    {c: i.storage_index.fqn for i, c in zip(plan.items, chunks, strict=True)}
                )
            for item, chunk in zip(plan.items, chunks, strict=True):
                target = planner.resolve_tensor(item).detach()
                dtype = TORCH_DTYPE[checkpoint.tensors[item.storage_index.fqn].dtype]
                _read_block(checkpoint.directory, chunk, dtype, item, target)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _chunks_of(self, plan: LoadPlan) -> list[Chunk]:
        """The stored chunk that each item of the plan reads from."""
        known: dict[str, dict[tuple[int, ...], Chunk]] = {}
        found = []
        for item in plan.items:
            key = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                raise CheckpointCorruptError(f"{key} is stored as a pickle, which is never read")
            if key not in known:
                known[key] = {c.box.offsets: c for c in self.catalog.tensors[key].chunks()}
            found.append(known[key][tuple(item.storage_index.offset or ())])
        return found

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _read_block(
    directory: Directory, chunk: Chunk, dtype: torch.dtype, item: ReadItem, target: Tensor
) -> None:
    """Copy ``lengths`` elements from ``storage_offsets`` of a chunk into ``target``."""
    sizes, start, lengths = chunk.box.sizes, item.storage_offsets, item.lengths
    if chunk.strides is not None or not sizes:
        whole = _read(directory, chunk, 0, chunk.num_bytes, dtype)
        block = whole.as_strided(sizes, chunk.strides or ())
        for dim, (offset, length) in enumerate(zip(start, lengths, strict=True)):
            block = block.narrow(dim, offset, length)
        target.copy_(block)
        return
    row_numel = chunk.box.numel // sizes[0]
    row_bytes = row_numel * dtype.itemsize
    rows = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, lengths[0], rows):
        count = min(rows, lengths[0] - first)
        position = (start[0] + first) * row_bytes
        block = _read(directory, chunk, position, count * row_bytes, dtype)
        block = block.view(count, *sizes[1:])
        for dim in range(1, len(sizes)):
            block = block.narrow(dim, start[dim], lengths[dim])
        target.narrow(0, first, count).copy_(block)


def _read(
    directory: Directory, chunk: Chunk, position: int, num_bytes: int, dtype: torch.dtype
) -> Tensor:
    """Elements of a chunk, from its byte ``position`` on."""
    buffer = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device="cpu")
    directory.read_into(chunk.file, buffer.view(torch.uint8).numpy(), chunk.byte_offset + position)
    return buffer
