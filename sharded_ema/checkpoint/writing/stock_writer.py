"""A ``StorageWriter`` that writes DCP's own file format, with our manifest and commit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import xxhash
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sharded_ema.checkpoint.dtypes import safetensors_name
from sharded_ema.checkpoint.names import METADATA_NAME
from sharded_ema.checkpoint.reading.manifest import FileRecord, TensorRecord
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES
from sharded_ema.checkpoint.writing.commit import (
    Commit,
    Place,
    Written,
    host_bytes,
    is_meta,
    meta_of,
)
from sharded_ema.checkpoint.writing.planning import Planner
from sharded_ema.errors import CheckpointWriteError


class StockStorageWriter(FileSystemWriter):
    """DCP's own file format with our commit, and a manifest beside ``.metadata``.

    What it writes can be loaded with ``torch.distributed.checkpoint.load`` where this library is
    not installed.

    Args:
        path: directory that will be the checkpoint.
        replace: replace a checkpoint that is there.
        ranks: how many save, if that is known before.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, replace: bool = False, ranks: int | None = None
    ) -> None:
        super().__init__(path, thread_count=1, sync_files=True)
        self._save = Commit(path, replace=replace, ranks=ranks)
        self._planned: Metadata | None = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the base class would create the target directory here

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return self._save.begin(super().prepare_global_plan(plans))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        place: Place = plan.storage_data
        if isinstance(planner, Planner):
            self._planned = planner.shared
        self.path = Path(place.directory)
        plan = dataclasses.replace(plan, storage_data=place.inner)
        # Without items the base class would leave an empty file that no manifest lists.
        try:
            results = super().write_data(plan, planner).wait() if plan.items else []
        except RuntimeError as error:
            _raise_interruption(error)
            raise CheckpointWriteError(f"cannot write to {self.path}: {_reason(error)}") from error
        digests: dict[str, FileRecord] = {}
        metas = {
            item.index: meta_of(host_bytes(planner.resolve_data(item)))
            for item in plan.items
            if is_meta(item)
        }
        extended: list[WriteResult] = []
        for result in results:
            name = result.storage_data.relative_path
            if name not in digests:
                digests[name] = _digest_file(self.path / name)
            extended.append(
                Written(
                    result.index,
                    result.size_in_bytes,
                    result.storage_data,
                    file=digests[name],
                    metas={i.fqn: data for i, data in metas.items() if i == result.index},
                )
            )
        future: Future[list[WriteResult]] = Future()
        future.set_result(extended)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._save.target.directory is not None
        self.path = Path(self._save.target.directory)
        metadata = metadata if self._planned is None else self._planned
        super().finish(metadata, results)
        written = [r for rank in results for r in rank if isinstance(r, Written)]
        tensors = [
            TensorRecord(
                key, tuple(stored.size), safetensors_name(stored.properties.dtype, key), 0, 0
            )
            for key, stored in sorted(metadata.state_dict_metadata.items())
            if isinstance(stored, TensorStorageMetadata)
        ]
        record = _digest_file(self.path / METADATA_NAME, durable=True)
        self._save.commit("dcp", written, tensors, record)

    def abandon(self) -> None:
        """Remove what a failed save has written, on the rank that made the directory."""
        self._save.target.abandon()


def _reason(error: RuntimeError) -> str:
    """Why torch.save failed: of a full disk it only says that a position is wrong."""
    causes = (cause for cause in _causes(error) if isinstance(cause, OSError))
    return str(next(causes, error))


def _raise_interruption(error: RuntimeError) -> None:
    """Raise what has interrupted torch.save, after which it says that a position is wrong, too."""
    for cause in _causes(error):
        if not isinstance(cause, Exception):
            raise cause from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


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
