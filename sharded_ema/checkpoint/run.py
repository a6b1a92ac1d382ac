"""The checkpoints of a run: directories side by side, of which the last one counts."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from sharded_ema.checkpoint.location import Location, as_location, entries, is_file
from sharded_ema.checkpoint.reading.listed import read_manifest
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.checkpoint.reading.opened import is_temporary
from sharded_ema.errors import CheckpointError, CheckpointNotFoundError


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed checkpoint.

    Attributes:
        path: its directory or URL.
        step: the step it was saved under.
        saved_at: when it was committed, Unix time in milliseconds.
        uuid: of the save.
        num_bytes: size of its files, without the manifest.
    """

    path: Location
    step: int
    saved_at: int
    uuid: str
    num_bytes: int


def committed_at(path: Location) -> Committed | None:
    """The committed checkpoint at ``path``; ``None`` if there is none, or no average in it.

    Only its manifest is read.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    if not is_file(path / MANIFEST_NAME):
        return None
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        if is_file(path / MANIFEST_NAME):
            raise
        return None  # removed between the look and the read
    steps = [meta["step"] for meta in manifest.emas.values() if type(meta.get("step")) is int]
    if not steps:
        return None
    num_bytes = sum(file.num_bytes for file in manifest.files)
    return Committed(path, max(steps), manifest.saved_at, manifest.uuid, num_bytes)


def committed(run: str | os.PathLike[str]) -> list[Committed]:
    """The committed checkpoints in the directory ``run`` that hold an average, oldest first.

    Only manifests are read. One that is damaged does not count.
    """
    found = []
    for name in entries(as_location(run)):
        with suppress(CheckpointError):
            at = None if is_temporary(name) else committed_at(as_location(run) / name)
            found += [at] if at else []
    return sorted(found, key=in_order)


def in_order(checkpoint: Committed) -> tuple[int, int]:
    """What the checkpoints of a run are sorted by: after going back, steps fall."""
    return checkpoint.saved_at, checkpoint.step


def latest_checkpoint(run: str | os.PathLike[str]) -> Location:
    """The checkpoint in the directory ``run`` that was committed last.

    The file ``latest`` is not asked: after a crash it may name the one before.

    Args:
        run: a directory, or a URL.

    Returns:
        A path, or for a URL a URL.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    found = committed(run)
    if not found:
        raise CheckpointNotFoundError(f"{run} holds no committed checkpoint of an average")
    return found[-1].path
