"""How a directory becomes a checkpoint: written beside its target, made durable, renamed.

``<path>.tmp-<uuid>`` is where all ranks write. Once every byte is on disk and the manifest says
so, one rename makes it ``<path>``; a crash at any moment leaves the target absent or whole. With
``replace`` the old checkpoint first steps aside as ``<path>.old-<uuid>``, where readers and the
next save find it if the process dies between the two renames.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sharded_ema.checkpoint.reading.catalog import set_aside
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.errors import CheckpointExistsError, CheckpointWriteError


def temporary(path: Path, uuid: str) -> Path:
    """Where the save ``uuid`` writes before it is committed."""
    return path.with_name(f"{path.name}.tmp-{uuid}")


def begin(path: Path, uuid: str, *, replace: bool) -> Path:
    """Make the directory to write into; run by the coordinator only.

    Raises:
        CheckpointExistsError: something is at ``path`` and ``replace`` is not set.
        CheckpointWriteError: the directory cannot be made.
    """
    recover(path)
    refuse_existing(path, replace=replace)
    staging = temporary(path, uuid)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise CheckpointWriteError(f"cannot create {staging}: {error}") from error
    return staging


def refuse_existing(path: Path, *, replace: bool) -> None:
    """Refuse a target that is taken, or that is no directory.

    Raises:
        CheckpointExistsError: see above.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise CheckpointExistsError(f"{path} exists and is not a directory; nothing was written")
    names = {entry.name for entry in path.iterdir()}
    if replace and names and MANIFEST_NAME not in names:
        raise CheckpointExistsError(
            f"{path} holds {len(names)} entries but no {MANIFEST_NAME}: it is no checkpoint of "
            "this library, and replace=True removes nothing else"
        )
    if not replace:
        raise CheckpointExistsError(
            f"{path} already exists and is left as it is; save to a new path, or pass "
            "replace=True to replace the checkpoint there"
        )


def publish(staging: Path, path: Path, *, replace: bool) -> None:
    """Make ``staging``, whose files are durable, the checkpoint at ``path``.

    Raises:
        CheckpointExistsError: something came to ``path`` while the save was running.
    """
    fsync_directory(staging)
    refuse_existing(path, replace=replace)
    aside = None
    if os.path.lexists(path):
        aside = path.with_name(f"{path.name}.old-{staging.name.rpartition('-')[2]}")
        os.rename(path, aside)
    # A directory can be renamed onto an empty one; that one would vanish unseen.
    refuse_existing(path, replace=False)
    os.rename(staging, path)
    fsync_directory(path.parent)
    if aside is not None:
        # The new checkpoint is committed; what cannot be removed of the old one is only in the way.
        shutil.rmtree(aside, ignore_errors=True)


def abandon(staging: Path) -> None:
    """Remove what a failed save has written."""
    shutil.rmtree(staging, ignore_errors=True)


def recover(path: Path) -> None:
    """Undo an interrupted replacement: the old checkpoint takes its place again."""
    old = set_aside(path)
    if old is not None and not os.path.lexists(path):
        os.rename(old, path)
        fsync_directory(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
