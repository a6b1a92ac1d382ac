"""The checkpoints of a run: directories side by side, of which the last one counts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sharded_ema.checkpoint.reading.catalog import Catalog, is_temporary, open_checkpoint
from sharded_ema.checkpoint.reading.locations import (
    Location,
    as_location,
    entries,
    exists,
    inside_of,
    is_file,
    name_of,
    parent_of,
    read_small,
)
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME, is_plain_name, parse_manifest
from sharded_ema.errors import CheckpointError, CheckpointNotFoundError

#: Name of the file that names the last checkpoint beside it.
LATEST_NAME = "latest"
# Larger than any name can be.
_MAX_POINTER_BYTES = 4096
# The manifest of a million tensors has about 100 MB.
_MAX_MANIFEST_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed checkpoint.

    Attributes:
        path: its directory or URL.
        step: the step it was saved under.
        saved_at: when it was committed, Unix time in milliseconds.
    """

    path: Location
    step: int
    saved_at: int


def committed(run: str | os.PathLike[str]) -> list[Committed]:
    """The committed checkpoints in the directory ``run`` that hold an average, oldest first.

    Only manifests are read. One that is damaged does not count.
    """
    found = []
    for name in entries(as_location(run)):
        path = inside_of(as_location(run), name)
        manifest = inside_of(path, MANIFEST_NAME)
        if is_temporary(name) or not is_file(manifest):
            continue
        try:
            data = read_small(manifest, _MAX_MANIFEST_BYTES)
            if data is None:
                continue
            fields = parse_manifest(data, str(manifest))
        except (CheckpointError, FileNotFoundError):
            continue  # damaged, or removed between the look and the read
        steps = [meta["step"] for meta in fields.emas.values() if type(meta.get("step")) is int]
        if steps:
            found.append(Committed(path, max(steps), fields.saved_at))
    return sorted(found, key=lambda c: (c.saved_at, c.step))


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


def find_checkpoint(location: str | os.PathLike[str]) -> Catalog:
    """Open the checkpoint at ``location``, or the one that a file ``latest`` there names.

    Raises:
        CheckpointError: see :func:`open_checkpoint`.
    """
    where = as_location(location)
    if name_of(where) == LATEST_NAME and is_file(where):
        named = _named_by(where)
        if named is None:
            raise CheckpointNotFoundError(f"{where} names no checkpoint beside it")
        where = named
    return open_checkpoint(where)


def is_pointer(location: Location) -> bool:
    """Whether a file ``latest`` may be replaced: there is none, or it names one of ours.

    One that is gone counts as ours.
    """
    if not exists(location):
        return True
    target = _named_by(location) if is_file(location) else None
    return target is not None and (not exists(target) or is_file(inside_of(target, MANIFEST_NAME)))


def _named_by(pointer: Location) -> Location | None:
    data = read_small(pointer, _MAX_POINTER_BYTES)
    name = (data or b"").decode(errors="replace").strip()
    return inside_of(parent_of(pointer), name) if is_plain_name(name) else None
