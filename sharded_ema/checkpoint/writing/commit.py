"""What the writers of both formats share: one save of several ranks and its commit."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from sharded_ema.checkpoint.names import META_KEY, is_meta_key
from sharded_ema.checkpoint.reading.manifest import (
    FileRecord,
    Manifest,
    TensorRecord,
    decode_meta,
    dump_manifest,
)
from sharded_ema.checkpoint.run import saved_last_beside
from sharded_ema.checkpoint.writing.target import make_target
from sharded_ema.errors import CheckpointWriteError
from sharded_ema.version import __version__


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank writes: directory of the save, its uuid, this rank's position.

    ``mark`` is what names of files have of the uuid, ``inner`` what DCP's own writer wants.
    """

    directory: str
    uuid: str
    position: int
    mark: str = ""
    inner: Any = None


@dataclass(frozen=True)
class Written(WriteResult):
    """What a rank has written, with what the manifest needs to know of it: an item or a file.

    Attributes:
        file: that it lies in; ``None`` of a rank that has nothing to write.
        metas: what averages in it say of themselves, by key.
    """

    file: FileRecord | None = None
    metas: Mapping[str, bytes] = field(default_factory=dict)


class Commit:
    """One save of several ranks, from the temporary directory to the rename.

    Args:
        path: directory or URL that will be the checkpoint.
        replace: replace a checkpoint that is there.
        ranks: how many save, if that is known before; else DCP's word is taken for it.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, replace: bool = False, ranks: int | None = None
    ) -> None:
        self.target = make_target(path)
        self.replace = replace
        self.ranks = ranks
        self.world_size = 1

    def again(self, path: str | os.PathLike[str]) -> Commit:
        """The same for another path."""
        return Commit(path, replace=self.replace, ranks=self.ranks)

    def begin(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the directory to write into, and tell all ranks of it; for the coordinator."""
        # Without a process group DCP takes every rank for one that saves alone.
        if self.ranks not in (None, len(plans)):
            raise _group_gone(f"{self.ranks} ranks should save and {len(plans)} do")
        directory = self.target.begin(replace=self.replace)
        self.world_size = len(plans)
        return [
            dataclasses.replace(
                plan,
                storage_data=Place(
                    directory, self.target.uuid, i, self.target.mark, plan.storage_data
                ),
            )
            for i, plan in enumerate(plans)
        ]

    def commit(
        self,
        format: str,
        written: Sequence[Written],
        tensors: Sequence[TensorRecord],
        *tables: FileRecord,
    ) -> None:
        """Publish what all ranks have written; for the coordinator.

        Args:
            format: of the data, as the manifest names it.
            written: by all ranks.
            tensors: sorted by key.
            tables: files that the coordinator has written beside those of the ranks.
        """
        if self.world_size > 1 and not dist.is_initialized():
            raise _group_gone("the other ranks are gone")
        manifest = Manifest(
            format=format,
            uuid=self.target.uuid,
            emas=_read_metas(written),
            tensors=tuple(tensors),
            files=(*files_of(written).values(), *tables),
            world_size=self.world_size,
            libraries=_libraries(),
            # The clock may have gone back, or be another machine's.
            saved_at=max(time.time_ns() // 1_000_000, 1 + saved_last_beside(self.target.location)),
        )
        self.target.publish(dump_manifest(manifest), replace=self.replace)


def _group_gone(what: str) -> CheckpointWriteError:
    return CheckpointWriteError(
        f"{what}: was the process group destroyed before close()? Nothing was committed"
    )


def _libraries() -> dict[str, str]:
    """Versions that a reader of the manifest may want to know."""
    return {
        "sharded_ema": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def is_meta(item: WriteItem) -> bool:
    """Whether an item describes an average; a parameter may have the same name, but not uint8."""
    return (
        is_meta_key(item.index.fqn)
        and item.tensor_data is not None
        and len(item.tensor_data.size) == 1
        and item.tensor_data.properties.dtype is torch.uint8
    )


def host_bytes(tensor: Any) -> Any:
    """The elements in C order as a numpy uint8 array; a view when they already lie so."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy()


def files_of(written: Sequence[Written]) -> dict[str, FileRecord]:
    """The files that ranks have written, by name; the order is that of the manifest."""
    return {r.file.name: r.file for r in written if r.file is not None}


def meta_of(data: Any) -> bytes:
    """What an average says of itself, of the bytes of its tensor: the padding is not sent."""
    return bytes(data.tobytes().rstrip(b"\0"))


def _read_metas(written: Sequence[Written]) -> dict[str, dict[str, Any]]:
    """What the averages in this save say of themselves, by the prefix of their keys."""
    return {
        key.removesuffix(META_KEY): decode_meta(data, key)
        for result in written
        for key, data in result.metas.items()
    }
