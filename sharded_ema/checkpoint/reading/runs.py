"""The checkpoints of a run: directories side by side, of which the last one counts."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from sharded_ema.checkpoint.reading.catalog import is_temporary
from sharded_ema.checkpoint.reading.locations import (
    Location,
    as_location,
    entries,
    inside_of,
    is_file,
    read_small,
)
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME, parse_manifest
from sharded_ema.errors import CheckpointError, CheckpointNotFoundError

# The manifest of a million tensors has about 100 MB.
_MAX_MANIFEST_BYTES = 1 << 30


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
        FileNotFoundError: it was removed just now.
    """
    manifest = inside_of(path, MANIFEST_NAME)
    data = read_small(manifest, _MAX_MANIFEST_BYTES) if is_file(manifest) else None
    if data is None:
        return None
    fields = parse_manifest(data, str(manifest))
    steps = [meta["step"] for meta in fields.emas.values() if type(meta.get("step")) is int]
    num_bytes = sum(file.num_bytes for file in fields.files)
    return Committed(path, max(steps), fields.saved_at, fields.uuid, num_bytes) if steps else None


def committed(run: str | os.PathLike[str]) -> list[Committed]:
    """The committed checkpoints in the directory ``run`` that hold an average, oldest first.

    Only manifests are read. One that is damaged does not count.
    """
    found = []
    for name in entries(as_location(run)):
        # Damaged, or removed between the look and the read.
        with suppress(CheckpointError, FileNotFoundError):
            at = None if is_temporary(name) else committed_at(inside_of(as_location(run), name))
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
