"""What may be removed, and removing it: nothing in this library deletes in any other way.

Nothing is removed but this:

1. **What was begun and not finished, and is provably ours and dead.** Its name has the mark of a
   temporary one, with digits of which eight follow from the others, or with those of a save whose
   files say the same; it belongs to this user and holds nothing but what a save or a consolidation
   writes, no link above all; and who held it is dead (:mod:`.holding`). One that is empty may go
   at any time: who has made it makes another.
2. **A committed checkpoint that the user has given up.** It was set aside by ``replace=True``, and
   what replaces it is committed; or ``keep_last`` leaves room for others of its series only.
3. **An export of a watch** that is one too many, in the directory that the user gave to it.
4. What the caller has begun itself, and what lies where it alone is at work.
5. A directory in which there is nothing, if something will take its place.

A directory is renamed to ``<name>.tmp-dead-<uuid>`` before it is removed. So a reader never meets
half of it under its name, who goes on removing it need not ask, and a save that, against all signs,
is still writing into it cannot rename it to a checkpoint any more. Under a URL nothing can be
renamed; there the manifest goes first, and what is left without it is no checkpoint. A save that
gives up removes the objects with its uuid in their names, once it has seen that the manifest is not
its own. What a killed save has left there stays, as nobody can tell that it is dead.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_ema.checkpoint.durable import fsync
from sharded_ema.checkpoint.files import (
    URL,
    Directory,
    Location,
    driver,
    entries,
    unfinished_uploads,
)
from sharded_ema.checkpoint.holding import DIRECTORY, Clock, Hold, Holder, read_holder
from sharded_ema.checkpoint.names import (
    CHECKPOINT_DIRECTORY,
    CHUNKS_NAME,
    DEAD_MARK,
    MANIFEST_NAME,
    SET_ASIDE_MARK,
    Marked,
    doomed,
    holders,
    is_holder,
    is_of_workplace,
    is_part,
    is_part_of,
    parse_marked,
    set_aside,
    temporary,
)
from sharded_ema.checkpoint.reading.manifest import read_manifest
from sharded_ema.checkpoint.run import (
    Committed,
    committed,
    committed_at,
    find_set_aside,
    named_by_latest,
)
from sharded_ema.checkpoint.safetensors import read_header
from sharded_ema.errors import CheckpointError, warn

logger = logging.getLogger("sharded_ema")

# ---------------------------------------------------------------------- removing


def remove(location: Location, identity: tuple[int, int] | None = None) -> str | None:
    """Remove a directory that no longer counts; what cannot be removed is only in the way.

    Under a URL it is a committed checkpoint, of which what its manifest lists is removed.

    Args:
        identity: device and inode of the directory that is meant, if its name could be another's
            by now.

    Returns:
        Why something of it is left, if that is so.

    Raises:
        OSError, CheckpointError: it lies under a URL, and an object cannot be removed.
    """
    if isinstance(location, URL):
        _remove_objects(location)
        return None
    grave = _bury(location, identity)
    return _erase(grave) if isinstance(grave, Path) else grave


def _bury(location: Path, identity: tuple[int, int] | None) -> Path | str | None:
    """Give a directory the name of what is being removed: that; why not; ``None`` if it is gone."""
    grave = doomed(location)
    try:
        os.rename(location, grave)
        status = os.lstat(grave)
        if identity is not None and (status.st_dev, status.st_ino) != identity:
            os.rename(grave, location)
            return f"{location} is another directory by now"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{location} cannot be removed: {error.strerror}"
    return grave


def _erase(grave: Path) -> str | None:
    """Remove what has the name of what is being removed; why something of it is left, if so."""
    problem = None
    try:
        shutil.rmtree(grave)
    except FileNotFoundError:  # another process removes it as well
        shutil.rmtree(grave, ignore_errors=True)
    except OSError as error:
        problem = f"{error.filename} cannot be removed: {error.strerror}"
        shutil.rmtree(grave, ignore_errors=True)
    return problem


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
    for upload in unfinished_uploads(url):
        if is_part_of(upload.name, uuid):
            fs.abort_mpu(upload.bucket, upload.key, upload.number)
    _remove_folder(fs, path)


def _remove_folder(fs: Any, path: str) -> None:
    # Where directories are real (drivers without any raise NotImplementedError); never the
    # bucket itself.
    if "/" in path.strip("/"):
        with suppress(OSError, CheckpointError, NotImplementedError):
            fs.rmdir(path)


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files that lie where the caller alone is at work."""
    for path in paths:
        path.unlink()


def remove_inside(path: Path) -> None:
    """Remove something that lies where the caller alone is at work; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_empty(path: Path) -> None:
    """Remove a directory in which there is nothing.

    Raises:
        OSError: there is something.
    """
    path.rmdir()


# ---------------------------------------------------------------------- who is at work


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a temporary directory.

    Attributes:
        place: where it lies.
        identity: device and inode.
        holder: who holds it, or has; ``None`` if nothing says so.
        foreign: why it may not be one of this library's that this user has made; ``""`` if it is.
        alive: whether somebody may be at work in it.
        is_bare: whether nothing but the beginning of a marker lies in it: who has made it, if that
            process is alive, makes another one.
    """

    place: Path
    identity: tuple[int, int]
    holder: Holder | None
    foreign: str
    alive: bool
    is_bare: bool = False

    @property
    def may_go(self) -> bool:
        """Whether it is provably ours, and dead."""
        return not self.foreign and not self.alive


def look_at(place: Path, clock: Clock) -> Found | None:
    """Who made a temporary directory, and who is at work in it; ``None`` if there is nothing.

    Args:
        clock: of its file system.
    """
    marked = parse_marked(place.name)
    try:
        descriptor = os.open(place, DIRECTORY)
    except FileNotFoundError:
        return None
    except OSError:
        return Found(place, (0, 0), None, "it is a link, or no directory", True)
    try:
        status = os.fstat(descriptor)
        identity = status.st_dev, status.st_ino
        if status.st_uid != os.geteuid():
            return Found(place, identity, None, f"it belongs to user {status.st_uid}", True)
        try:
            inside = _Inside(descriptor, status.st_mtime_ns)
        except FileNotFoundError:  # it is being changed, so somebody is at work
            return Found(place, identity, None, "", True)
        return _judge(place, marked, identity, inside, descriptor, clock)
    finally:
        os.close(descriptor)


def _judge(
    place: Path,
    marked: Marked | None,
    identity: tuple[int, int],
    inside: _Inside,
    descriptor: int,
    clock: Clock,
) -> Found:
    markers = holders(inside.names)
    holder = read_holder(descriptor, _uuid_of(markers[0])) if len(markers) == 1 else None
    foreign = inside.foreign
    if not foreign and (marked is None or not (marked.is_own or _proves(place, marked, inside))):
        foreign = "nothing proves that this library has made it"
    if foreign:
        return Found(place, identity, holder, foreign, True)
    if all(map(is_holder, inside.names)) and not markers:
        return Found(place, identity, None, "", alive=False, is_bare=True)
    alive = holder.is_alive if holder is not None else None
    if alive is None:
        alive = not clock.has_been_silent(inside.last)
    return Found(place, identity, holder, "", alive)


def _remove_found(found: Found) -> None:
    """Remove a directory that may go."""
    if not found.is_bare:
        remove(found.place, found.identity)
        return
    # Its maker may hold it in this very moment, and would not notice another name. So it goes only
    # if it stays bare: without the beginning of its marker, or without itself, the maker begins
    # again, and with a marker in it, it cannot go.
    with suppress(OSError):
        descriptor = os.open(found.place, DIRECTORY)
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != found.identity:
                return
            with os.scandir(descriptor) as inside:
                names = [entry.name for entry in inside]
            for name in names:
                if is_holder(name) and not holders([name]):
                    os.unlink(name, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        os.rmdir(found.place)


def _uuid_of(marker: str) -> str:
    return marker.removeprefix("holder-").removesuffix(".json")


class _Inside:
    """What lies in an open directory, links not followed.

    Attributes:
        names: of its entries.
        last: the latest time of anything in it, in nanoseconds of the file system's clock.
        foreign: what in it this library cannot have made; ``""`` without such a thing.
    """

    def __init__(self, descriptor: int, last: int) -> None:
        self.names = set(os.listdir(descriptor))
        self.last = last
        self.foreign = ""
        for name in sorted(self.names):
            if not (is_of_workplace(name) or is_part(name)):
                self.foreign = f"it holds {name!r}"
        self._walk(descriptor, "")

    def _walk(self, descriptor: int, above: str) -> None:
        with os.scandir(descriptor) as found:
            for entry in found:
                status, name = entry.stat(follow_symlinks=False), f"{above}{entry.name}"
                self.last = max(self.last, status.st_mtime_ns)
                if stat.S_ISLNK(status.st_mode):
                    self.foreign = f"it holds the link {name!r}"
                elif status.st_uid != os.geteuid():
                    self.foreign = f"it holds {name!r} of user {status.st_uid}"
                elif above == f"{CHECKPOINT_DIRECTORY}/" and not is_part(entry.name):
                    self.foreign = f"it holds {name!r}"
                elif stat.S_ISDIR(status.st_mode):
                    inner = os.open(entry.name, DIRECTORY, dir_fd=descriptor)
                    try:
                        self._walk(inner, f"{name}/")
                    finally:
                        os.close(inner)


def _proves(place: Path, marked: Marked, inside: _Inside) -> bool:
    """Whether files say that they are of the save whose digits the name has.

    Names of earlier versions have the digits of any uuid.
    """
    with suppress(CheckpointError):
        directory = Directory(place)
        if MANIFEST_NAME in inside.names:
            return read_manifest(directory).uuid == marked.uuid
        for name in sorted(inside.names):
            if name.startswith("shard-") or name == CHUNKS_NAME:
                return read_header(directory / name)[1].get("uuid") == marked.uuid
    return False


def occupy(place: Path, beside: Path) -> Hold | Found:
    """Hold a directory that has the same name each time, and take it over from a dead process.

    Args:
        place: its temporary path.
        beside: path by which to name what is made first, and renamed.

    Returns:
        What is there, if it is somebody else's.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        hold = Hold.make(temporary(beside))
        try:
            hold.move(place)
        except OSError as error:
            discard(hold)
            # What was in the way may have gone since.
            taken_away = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
            if not taken_away and not os.path.lexists(place):
                raise
        except BaseException:
            discard(hold)
            raise
        else:
            return hold
        found = look_at(place, Clock(place.parent))
        if found is None:
            continue
        if not found.may_go:
            return found
        if found.holder is not None:
            taken = Hold.take_over(place, found.holder, found.identity)
            if taken is not None:
                return taken
        else:
            _remove_found(found)


def discard(hold: Hold) -> str | None:
    """Remove a directory that this process holds, and hold it no longer; why not, if it fails."""
    grave: Path | str | None = None
    if hold.is_mine:
        status = os.fstat(hold.descriptor)
        # While it is held, or another thread would take it over under the name that it has.
        grave = _bury(hold.place, (status.st_dev, status.st_ino))
    hold.close()  # files that are open would stay behind on NFS
    return _erase(grave) if isinstance(grave, Path) else grave


@contextmanager
def holding(place: Path) -> Iterator[Hold]:
    """A new temporary directory, for the time of a block."""
    hold = Hold.make(place)
    try:
        yield hold
    finally:
        discard(hold)


# ---------------------------------------------------------------------- saves


def remove_leftovers(folder: Path) -> None:
    """Remove what dead saves and consolidations have left in a directory.

    What was about to be replaced takes its place again, unless the replacement is under way.
    """
    clock = Clock(folder)
    marks = {path: m for path in list(folder.iterdir()) if (m := parse_marked(path.name))}
    for path, marked in marks.items():
        if marked.mark == SET_ASIDE_MARK:
            successor = folder / marked.name
            recover(successor, clock)
            if not _is_replacing(successor, clock) and _was_replaced(path, marked):
                remove(path)
        else:
            remove_if_left(path, clock)


def remove_if_left(path: Path, clock: Clock) -> None:
    """Remove something with a temporary name if it is provably ours, and dead."""
    marked = parse_marked(path.name)
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if marked is None or status.st_uid != os.geteuid():
        return
    if stat.S_ISREG(status.st_mode):
        # Made to ask for the time, by who asks no more once it is there.
        if marked.is_own and not status.st_size:
            with suppress(OSError):
                path.unlink()
    elif stat.S_ISDIR(status.st_mode):
        if marked.mark == DEAD_MARK and marked.is_own:
            _erase(path)
            return
        found = look_at(path, clock)
        if found is not None and found.may_go:
            _remove_found(found)


def _is_replacing(path: Path, clock: Clock) -> bool:
    """Whether somebody may be at work on something that will be ``path``."""
    for sibling in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        marked = parse_marked(sibling.name)
        if marked and marked.name == path.name and marked.mark not in (SET_ASIDE_MARK, DEAD_MARK):
            found = look_at(sibling, clock)
            if found is not None and found.alive and not found.foreign:
                return True
    return False


def _was_replaced(aside: Path, marked: Marked) -> bool:
    """Whether a checkpoint was set aside by this library, and has a committed successor."""
    if not (aside.parent / marked.name / MANIFEST_NAME).is_file() or aside.is_symlink():
        return False
    if marked.is_own:
        return True
    try:  # by an earlier version
        return committed_at(aside) is not None
    except CheckpointError:
        return False


def put_aside(path: Path, uuid: str) -> Path:
    """Rename a checkpoint that the save of ``uuid`` is about to replace; where it lies now."""
    aside = set_aside(path, uuid)
    os.rename(path, aside)
    return aside


def recover(path: Path, clock: Clock | None = None) -> None:
    """Undo an interrupted replacement: the old checkpoint takes its place again."""
    old = find_set_aside(path)
    if old is None or os.path.lexists(path) or _is_replacing(path, clock or Clock(path.parent)):
        return
    with suppress(FileNotFoundError):  # by another process, at the same moment
        os.rename(old, path)
        fsync(path.parent)


def remove_outdated(newest: Committed, keep_last: int) -> None:
    """Remove all but the last checkpoints of the average and series that a new one belongs to.

    A series are checkpoints of one average, known by the uuid of its run, whose names differ from
    each other in one number, the step. What ``latest`` names stays in any case.

    Raises:
        OSError: an object of a store cannot be removed.
    """
    series = [
        c
        for c in committed(newest.path.parent)
        if c.run and c.run == newest.run and is_of_series(c, newest) and not _is_link(c.path)
    ]
    others = [c for c in series if c.path.name != newest.path.name]
    spared = named_by_latest(newest.path.parent)
    for old in others[: max(0, len(others) - (keep_last - 1))]:
        if old.path.name == spared:
            continue
        problem = remove(old.path)
        if problem:
            warn(f"keep_last={keep_last} leaves something of {old.path}: {problem}")
        else:
            logger.info("keep_last=%d removed %s (step %d)", keep_last, old.path, old.step)


def _is_link(location: Location) -> bool:
    return isinstance(location, Path) and location.is_symlink()


def is_of_series(one: Committed, other: Committed) -> bool:
    """Whether the names of two checkpoints differ in one number only, that of the step if any is.

    >>> # seed0_step_100 and seed0_step_200, but not seed1_step_100
    """
    mine, theirs = (re.split(r"(\d+)", c.path.name) for c in (one, other))
    if len(mine) != len(theirs):
        return False
    differing = [i for i, pair in enumerate(zip(mine, theirs, strict=True)) if len(set(pair)) > 1]
    if not differing:
        return True
    if len(differing) > 1 or not differing[0] % 2:
        return False
    (place,) = differing
    for parts, checkpoint in ((mine, one), (theirs, other)):
        steps = [i for i in range(1, len(parts), 2) if int(parts[i]) == checkpoint.step]
        if steps and place not in steps:
            return False
    return True


# ---------------------------------------------------------------------- consolidations


def remove_workplaces(target: Path, *, but: Path | None = None) -> None:
    """Remove what killed consolidations into ``target`` have left; one directory stays."""
    clock = Clock(target.parent)
    for path in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        marked = parse_marked(path.name)
        if path != but and marked and marked.name == target.name and marked.mark != SET_ASIDE_MARK:
            # What cannot be removed is only in the way.
            with suppress(OSError):
                remove_if_left(path, clock)


# ---------------------------------------------------------------------- watches


def sweep(folder: Path, but: Path) -> None:
    """Remove what is half-written in the directory of a watch that holds ``but`` in it."""
    clock = Clock(folder)
    for path in folder.iterdir():
        marked = parse_marked(path.name)
        if marked is None or marked.mark == SET_ASIDE_MARK or path == but:
            continue
        if path.is_symlink():  # one that was to be ``latest``
            if marked.is_own:
                path.unlink(missing_ok=True)
        else:
            remove_if_left(path, clock)
