"""What may be removed, and removing it: nothing in this library deletes in any other way.

Nothing is removed but this:

1. **What was begun and not finished.** It bears the mark of a temporary name with the digits of a
   save or a plan; it holds nothing but what a save or a consolidation writes, or lies in the
   directory that the user gave to a watch; and nobody is at work on it.
2. **A committed checkpoint that the user has given up.** It was set aside by ``replace=True``, and
   what replaces it is committed; or ``keep_last`` leaves room for others of its kind only.
3. **An export of a watch** that is one too many, in the directory that the user gave to it.
4. What the caller has begun itself, and what lies where it alone is at work.
5. A directory in which there is nothing, if something will take its place.

Who is at work is known by locks: whoever saves holds a shared lock on the directory around the
checkpoint, whoever consolidates, one on the directory that is worked in, a watch, one on the
directory of its exports. The system drops a lock when its process dies, so who gets it alone knows
that what is half-written there is nobody's.

A directory is renamed before it is removed. So a reader never meets half of it under its name, and
a save that, against all locks, is still writing into it cannot rename it to a checkpoint any more.
Under a URL nothing can be renamed and there are no locks; there the manifest goes first, and what
is left without it is no checkpoint. A save that gives up removes the objects with its uuid in their
names, once it has seen that the manifest is not its own. What a killed save has left there stays,
as nobody can tell that it is dead.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from sharded_ema.checkpoint.durable import fsync
from sharded_ema.checkpoint.files import URL, Directory, Location, driver, entries
from sharded_ema.checkpoint.names import (
    MANIFEST_NAME,
    is_of_workplace,
    is_part,
    is_part_of,
    is_set_aside,
    is_temporary,
    set_aside,
    temporary,
    without_mark,
)
from sharded_ema.checkpoint.reading.manifest import read_manifest
from sharded_ema.checkpoint.run import committed, find_set_aside

# ---------------------------------------------------------------------- removing


def remove(location: Location) -> None:
    """Remove a directory that no longer counts; what cannot be removed is only in the way.

    Under a URL it is a committed checkpoint, of which what its manifest lists is removed.

    Raises:
        OSError, CheckpointError: it lies under a URL, and an object cannot be removed.
    """
    if isinstance(location, URL):
        _remove_objects(location)
        return
    # Without the mark that it may have, so that names do not grow.
    doomed = temporary(location.with_name(without_mark(location.name)))
    try:
        os.rename(location, doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_objects(url: URL) -> None:
    fs, path = driver(url)
    # What other saves write there is not of this checkpoint.
    listed = [file.name for file in read_manifest(Directory(url)).files]
    for name in [MANIFEST_NAME, *sorted(entries(url).intersection(listed))]:
        fs.rm_file(f"{path}/{name}")
    _remove_folder(fs, path)


def remove_parts(url: URL, uuid: str) -> None:
    """Remove what one save has written under a URL, which must not be committed.

    Raises:
        OSError, CheckpointError: an object cannot be removed.
    """
    fs, path = driver(url)
    for name in entries(url):
        if is_part_of(name, uuid):
            fs.rm_file(f"{path}/{name}")
    _remove_folder(fs, path)


def _remove_folder(fs: Any, path: str) -> None:
    # Where directories are real (drivers without any raise NotImplementedError); never the
    # bucket itself.
    if "/" in path.strip("/"):
        with suppress(OSError, NotImplementedError):
            fs.rmdir(path)


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files that lie where the caller alone is at work."""
    for path in paths:
        path.unlink()


def remove_empty(path: Path) -> None:
    """Remove a directory in which there is nothing.

    Raises:
        OSError: there is something.
    """
    path.rmdir()


# ---------------------------------------------------------------------- who is at work


def lock_alone(descriptor: int) -> bool | None:
    """Whether nobody else is at work in an open directory; from now on, the caller is.

    Returns:
        ``None`` if nobody can tell: not every file system has locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _holds_only(path: Path, known: Callable[[str], bool]) -> bool:
    """Whether all names in a directory are such as this library gives."""
    try:
        return all(known(entry.name) for entry in path.iterdir())
    except FileNotFoundError:  # of somebody else, who removed it at this moment
        return False


# ---------------------------------------------------------------------- saves


class Occupied:
    """A directory in which a save is under way, until closed.

    If no other is under way there, what killed saves have left is removed first.

    Args:
        folder: the directory; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if lock_alone(self._descriptor):
                _remove_leftovers(folder)
            # Without locks a save whose directory another one removes fails at its rename.
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        except BaseException:  # a lock that nobody knows of would keep all others waiting
            self.close()
            raise

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
    """Remove temporary directories, and what was replaced.

    What was about to be replaced takes its place again.
    """
    for path in list(folder.iterdir()):
        if is_set_aside(path.name):
            successor = folder / without_mark(path.name)
            recover(successor)
            if (successor / MANIFEST_NAME).is_file():
                remove(path)
        elif is_temporary(path.name) and not path.is_symlink():
            if path.is_file():
                with suppress(OSError):
                    path.unlink()
            elif path.is_dir() and _holds_only(path, is_part):
                remove(path)


def put_aside(path: Path) -> Path:
    """Rename a checkpoint that is about to be replaced; where it lies now."""
    aside = set_aside(path)
    os.rename(path, aside)
    return aside


def recover(path: Path) -> None:
    """Undo an interrupted replacement: the old checkpoint takes its place again."""
    old = find_set_aside(path)
    if old is not None and not os.path.lexists(path):
        os.rename(old, path)
        fsync(path.parent)


def remove_outdated(newest: Location, keep_last: int) -> None:
    """Remove all but the last checkpoints beside a new one whose names differ in digits only.

    So a ``best`` beside ``step_100`` stays, and so does the new one.

    Raises:
        OSError: see :func:`remove`.
    """
    kind = _kind(newest)
    others = [c.path for c in committed(newest.parent) if _kind(c.path) == kind]
    others = [other for other in others if other.name != newest.name]
    for old in others[: max(0, len(others) - (keep_last - 1))]:
        remove(old)


def _kind(location: Location) -> str:
    return re.sub(r"\d+", "0", location.name)


# ---------------------------------------------------------------------- consolidations


def remove_workplaces(target: Path, *, but: Path | None = None) -> None:
    """Remove what killed consolidations into ``target`` have left; one directory stays."""
    for path in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        if path != but and is_temporary(path.name) and without_mark(path.name) == target.name:
            # What cannot be removed is only in the way.
            with suppress(OSError):
                _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    with suppress(OSError):
        remove_empty(path)  # killed before there was anything in it, or after
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if _holds_only(path, is_of_workplace) and lock_alone(descriptor) is not False:
            remove(path)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- watches


def sweep(folder: Path) -> None:
    """Remove what is half-written in the directory of a watch that holds its lock."""
    for path in folder.iterdir():
        if not is_temporary(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
