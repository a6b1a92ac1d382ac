"""How a directory becomes a checkpoint: written beside its target, made durable, renamed.

``<path>.tmp-<uuid>`` is where all ranks write. Once every byte is on disk and the manifest says
so, one rename makes it ``<path>``; a crash at any moment leaves the target absent or whole. With
``replace`` the old checkpoint first steps aside as ``<path>.old-<uuid>``, where readers and the
next save find it if the process dies between the two renames.

Whoever writes below a directory holds a shared lock on it, which the system drops when the process
dies. Who gets the lock alone knows that what lies there half-written is nobody's, and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Self
from uuid import uuid4

from sharded_ema.checkpoint.durable import fsync, write_durably
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.checkpoint.reading.opened import is_part, set_aside
from sharded_ema.errors import CheckpointExistsError, CheckpointWriteError

_TEMPORARY = re.compile(r"(?P<name>.+)\.tmp-[0-9a-f]{32}")
_SET_ASIDE = re.compile(r"(?P<name>.+)\.old-[0-9a-f]{32}")


def temporary(path: Path) -> Path:
    """A new name beside ``path`` for what will be renamed to it, or is about to be removed."""
    return path.with_name(f"{path.name}.tmp-{uuid4().hex}")


class Occupied:
    """A directory in which a save is under way, until closed.

    Args:
        folder: the directory; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass  # another save is under way, or this file system has no locks: nothing is removed
        else:
            _remove_leftovers(folder)
        # Without locks a save whose directory another one removes fails at its rename.
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Give the lock back; harmless if done before."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed saves have left: temporary directories, and what they have replaced.

    What they were about to replace takes its place again.
    """
    for path in list(folder.iterdir()):
        old = _SET_ASIDE.fullmatch(path.name)
        if old:
            recover(folder / old["name"])
            if (folder / old["name"] / MANIFEST_NAME).is_file():
                remove(path)
        elif _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
            if path.is_file():
                with suppress(OSError):
                    path.unlink()
            elif path.is_dir() and _holds_only_parts(path):
                remove(path)


def _holds_only_parts(path: Path) -> bool:
    try:
        return all(is_part(entry.name) for entry in path.iterdir())
    except FileNotFoundError:  # of somebody else, who removed it at this moment
        return False


def remove(path: Path) -> None:
    """Remove a directory that no longer counts; what cannot be removed is only in the way.

    It is renamed first. So a reader never meets half of it under its name, and a save that, against
    all locks, is still writing into it cannot rename it to a checkpoint any more.
    """
    doomed = temporary(_bare(path))
    try:
        os.rename(path, doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _bare(path: Path) -> Path:
    """Without the marks of a temporary or replaced directory, so that names do not grow."""
    match = _TEMPORARY.fullmatch(path.name) or _SET_ASIDE.fullmatch(path.name)
    return path.with_name(match["name"]) if match else path


def begin(path: Path, *, replace: bool) -> tuple[Path, Occupied]:
    """Make the directory to write into; run by the coordinator only.

    Returns:
        The directory, and the lock to close when it has been published or abandoned.

    Raises:
        CheckpointExistsError: something is at ``path`` and ``replace`` is not set.
        CheckpointWriteError: the directory cannot be made.
    """
    staging = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        refuse_existing(path, replace=replace)
        occupied = Occupied(path.parent)
        staging.mkdir()
    except OSError as error:
        if isinstance(error, CheckpointExistsError):
            raise
        raise CheckpointWriteError(f"cannot create {staging}: {error}") from error
    return staging, occupied


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
    fsync(staging)
    refuse_existing(path, replace=replace)
    aside = None
    if replace and os.path.lexists(path):
        aside = path.with_name(f"{path.name}.old-{uuid4().hex}")
        os.rename(path, aside)
    try:
        # A directory can be renamed onto an empty one; that one would vanish unseen.
        refuse_existing(path, replace=False)
        os.rename(staging, path)
    except OSError as error:
        if aside is not None:
            recover(path)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # it came in this very moment
            refuse_existing(path, replace=False)
        raise
    fsync(path.parent)
    if aside is not None:
        remove(aside)


def recover(path: Path) -> None:
    """Undo an interrupted replacement: the old checkpoint takes its place again."""
    old = set_aside(path)
    if old is not None and not os.path.lexists(path):
        os.rename(old, path)
        fsync(path.parent)


def replace_durably(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old bytes or the new ones."""
    new = temporary(path)
    write_durably(new, data)
    new.replace(path)
    fsync(path.parent)
