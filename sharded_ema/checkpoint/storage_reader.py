"""A ``StorageReader`` of torch.distributed.checkpoint for our format and for DCP's own.

It never unpickles: what it knows of a checkpoint comes from :mod:`.reading`, which has no torch,
and tensors are read as byte ranges. DCP plans which part of which chunk goes where, so a checkpoint
loads into any other sharding.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from sharded_ema.checkpoint.dtypes import TORCH_DTYPE
from sharded_ema.checkpoint.files import as_location, gone
from sharded_ema.checkpoint.filling import Filling, fill
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Box


class SafetensorsStorageReader(StorageReader):
    """Reads a committed checkpoint of this library, in either of its formats.

    Use it with ``torch.distributed.checkpoint.load(state, storage_reader=...)``.

    Args:
        path: directory or URL of the checkpoint.
        verify: compare the digest of every chunk that is read, in DCP's format of the files that
            hold them; some of the state may be overwritten when one is wrong.

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
            self._catalog = open_checkpoint(self._path, check_files=False)
        return self._catalog

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            described: Any = _Described(self.catalog)
            self._metadata = Metadata(state_dict_metadata=described)
        return self._metadata

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
            targets = [planner.resolve_tensor(item).detach() for item in plan.items]
            fillings = [
                Filling(item.storage_index.fqn, chunk, _box(item), target)
                for item, chunk, target in zip(plan.items, chunks, targets, strict=True)
            ]
            # Any rank may be the only one to look at a file.
            fill(checkpoint, fillings, verify=self._verify, headers={c.file for c in chunks})
            for item, target in zip(plan.items, targets, strict=True):
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


def _box(item: ReadItem) -> Box:
    """The elements that an item reads, counted from the first of its chunk."""
    return Box(tuple(item.storage_offsets), tuple(item.lengths))


class _Described(Mapping[str, TensorStorageMetadata]):
    """What DCP is told of the tensors of a checkpoint, made for those that it asks for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors

    def __getitem__(self, key: str) -> TensorStorageMetadata:
        tensor = self._tensors[key]
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=TORCH_DTYPE[tensor.dtype]),
            size=torch.Size(tensor.shape),
            chunks=[
                ChunkStorageMetadata(torch.Size(c.box.offsets), torch.Size(c.box.sizes))
                for c in tensor.chunks()
            ],
        )

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
