"""What becomes a checkpoint and how: a directory that is renamed, or objects under a URL.

``<path>.tmp-<uuid>`` is held by the coordinator (:mod:`..holding`); all ranks write into the
directory ``checkpoint`` in it. Once every byte is on disk and the manifest says so, one rename
makes that ``<path>``; a crash at any moment leaves the target absent or whole. With ``replace`` the
old checkpoint first steps aside as ``<path>.old-<uuid>``, where readers and the next save find it
if the process dies between the two renames.

Object stores rename nothing at once: there the objects lie under their last names from the
beginning, and the manifest, which is written after all others and only if there is none, makes
them a checkpoint.
"""

from __future__ import annotations

import errno
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sharded_ema.checkpoint import durable, removal
from sharded_ema.checkpoint.files import (
    URL,
    Location,
    as_location,
    driver,
    entries,
    is_bucket_store,
    reaching,
)
from sharded_ema.checkpoint.holding import DIRECTORY, Hold
from sharded_ema.checkpoint.names import (
    CHECKPOINT_DIRECTORY,
    LATEST_NAME,
    MANIFEST_NAME,
    is_part,
    new_uuid,
    temporary,
)
from sharded_ema.checkpoint.run import committed_at, is_pointer
from sharded_ema.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointWriteError,
    ConfigError,
    warn,
)


class Target(ABC):
    """What one rank, the coordinator, does with the place of a checkpoint.

    Args:
        location: of the checkpoint to be.

    Attributes:
        location: see above.
        directory: where all ranks write, once begun; ``None`` before and after.
        uuid: of the save that has begun.
    """

    directory: str | None = None
    uuid: str

    @property
    def mark(self) -> str:
        """What the names of its files must have of the uuid: nothing, or all of it."""
        return ""

    def __init__(self, location: Location) -> None:
        self.location = location

    @abstractmethod
    def check(self, *, replace: bool) -> None:
        """Refuse a place that is taken.

        Raises:
            CheckpointExistsError: see above.
            ConfigError: ``replace`` where nothing can be replaced safely.
        """

    @abstractmethod
    def begin(self, *, replace: bool) -> str:
        """Make the directory to write into.

        Raises:
            CheckpointExistsError: as in :meth:`check`.
            CheckpointWriteError: it cannot be made.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write one small file into it, durably."""

    @abstractmethod
    def publish(self, manifest: bytes, *, replace: bool) -> None:
        """Make what all ranks have written a checkpoint."""

    @abstractmethod
    def abandon(self) -> None:
        """Remove what was begun and not published; harmless otherwise."""

    @abstractmethod
    def _point(self, data: bytes) -> None:
        """Replace the file ``latest`` beside the checkpoint at once."""

    def settle(self, *, latest: bool, keep_last: int | None) -> None:
        """After the commit: let ``latest`` name it, remove old ones. What fails is warned of."""
        try:
            # DeepSpeed has a file of this name, users have links: what is not ours stays.
            if latest and is_pointer(self.location.parent / LATEST_NAME):
                self._point(f"{self.location.name}\n".encode())
            newest = committed_at(self.location) if keep_last is not None else None
            if newest is not None and keep_last is not None:
                removal.remove_outdated(newest, keep_last)
        except (OSError, CheckpointError) as error:
            warn(
                f"{self.location} is committed, but what lies beside it could not be brought up "
                f"to date: {error}"
            )


class LocalTarget(Target):
    """A directory of a file system."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path
        self._hold: Hold | None = None
        self._folder: int | None = None

    def check(self, *, replace: bool) -> None:
        refuse_existing(self._path, replace=replace)

    def begin(self, *, replace: bool) -> str:
        uuid = new_uuid()
        place = temporary(self._path, uuid)
        try:
            durable.make_directories(self._path.parent)
            with suppress(OSError):  # what cannot be looked at is only in the way
                removal.remove_leftovers(self._path.parent)
            removal.recover(self._path)
            refuse_existing(self._path, replace=replace)
            self._hold = Hold.make(place)
            os.mkdir(CHECKPOINT_DIRECTORY, dir_fd=self._hold.descriptor)
            self._folder = os.open(CHECKPOINT_DIRECTORY, DIRECTORY, dir_fd=self._hold.descriptor)
        except OSError as error:
            self.abandon()
            if isinstance(error, CheckpointExistsError):
                raise
            raise CheckpointWriteError(f"cannot create {place}: {error.strerror}") from error
        self.uuid = uuid
        self.directory = str(place / CHECKPOINT_DIRECTORY)
        return self.directory

    def write(self, name: str, data: bytes) -> None:
        assert self.directory is not None
        durable.write_durably(Path(self.directory, name), data, self._folder)

    def publish(self, manifest: bytes, *, replace: bool) -> None:
        assert self._hold is not None
        self.write(MANIFEST_NAME, manifest)
        publish(self._hold, CHECKPOINT_DIRECTORY, self._path, replace=self.uuid if replace else "")
        self.abandon()  # what is left of the temporary directory

    def abandon(self) -> None:
        self.directory = None
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None
        if self._hold is not None:
            removal.discard(self._hold)
            self._hold = None

    def _point(self, data: bytes) -> None:
        pointer = self._path.parent / LATEST_NAME
        with removal.holding(temporary(pointer)) as hold:
            durable.write_durably(hold.place / LATEST_NAME, data, hold.descriptor)
            os.rename(LATEST_NAME, pointer, src_dir_fd=hold.descriptor)
        durable.fsync(pointer.parent)


class RemoteTarget(Target):
    """A prefix of an object store, or whatever else fsspec has a driver for.

    There are no locks. Every object but the manifest has the uuid of its save in its name, so that
    jobs which save to one URL at the same moment write beside each other. The manifest is put on
    the condition that there is none: the first one commits, the others are told.
    """

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self._url = url
        self._fs, self._path = driver(url)

    @property
    def mark(self) -> str:
        return self.uuid

    def check(self, *, replace: bool) -> None:
        if replace:
            raise ConfigError(
                f"replace=True needs a file system that renames, {self._url} does not; save under "
                "a new name, with keep_last to remove old checkpoints"
            )
        try:
            names, is_file = entries(self._url), self._fs.isfile(self._path)
        except OSError as error:
            raise CheckpointWriteError(f"{self._url} cannot be looked at: {error}") from error
        foreign = {name for name in names if not is_part(name)}
        if MANIFEST_NAME in names or foreign or is_file:
            raise CheckpointExistsError(
                f"{self._url} already exists and is left as it is; save to a new URL"
            )

    def begin(self, *, replace: bool) -> str:
        self.check(replace=replace)
        try:
            if is_bucket_store(self._url):
                # To make directories would be to make the bucket.
                bucket = self._path.strip("/").partition("/")[0]
                if not self._fs.exists(bucket):
                    raise CheckpointWriteError(f"there is no bucket {bucket!r} for {self._url}")
            else:
                self._fs.makedirs(self._path, exist_ok=True)
        except OSError as error:
            raise CheckpointWriteError(f"cannot write to {self._url}: {error}") from error
        self.uuid = new_uuid()
        self.directory = self._url
        return self._url

    def write(self, name: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(f"{self._path}/{name}", data)
        except (OSError, CheckpointError) as error:
            raise CheckpointWriteError(f"cannot write {self._url}/{name}: {error}") from error

    def publish(self, manifest: bytes, *, replace: bool) -> None:
        self.check(replace=replace)
        path = f"{self._path}/{MANIFEST_NAME}"
        failure: OSError | CheckpointError | None = None
        try:
            self._fs.pipe_file(path, manifest, **self._condition())
        except (OSError, CheckpointError) as error:
            failure = error
        # What it says is not the last word: a request that was sent again finds its own manifest,
        # and there are stores that know of no conditions.
        found = self._committed(failure)
        is_taken = isinstance(failure, FileExistsError)
        if found == manifest:
            self.directory = None
            return
        if found is None and is_taken:  # and is not shown: it could be this one's
            self.directory = None
        if found is not None or is_taken:
            raise CheckpointExistsError(
                f"another job has saved to {self._url} meanwhile; that checkpoint stays, this save "
                "is given up; save to a new URL"
            ) from failure
        said = failure or f"{self._url} does not show what was written to it"
        raise CheckpointWriteError(f"cannot write the manifest: {said}") from failure

    def _condition(self) -> dict[str, Any]:
        """How its driver is told to put only what is not there; nothing where it knows no way."""
        known = inspect.signature(self._fs.pipe_file).parameters
        if "mode" in known:
            return {"mode": "create"}
        return {"overwrite": False} if "overwrite" in known else {}  # as Azure's calls it

    def _committed(self, failure: Exception | None = None) -> bytes | None:
        """The manifest that is there.

        Args:
            failure: to be told of if that cannot be seen.
        """
        self._fs.invalidate_cache()  # drivers answer from what they have listed earlier
        try:
            return bytes(self._fs.cat_file(f"{self._path}/{MANIFEST_NAME}"))
        except FileNotFoundError:
            return None
        except (OSError, CheckpointError) as error:
            raise CheckpointWriteError(
                f"{self._url}: whether the manifest was written cannot be seen: {failure or error}"
            ) from error

    def abandon(self) -> None:
        if self.directory is None:
            return
        self.directory = None
        # What cannot be asked or removed is left: it is in nobody's way.
        with suppress(OSError, CheckpointError):
            found = self._committed()
            if found is None or self.uuid.encode() not in found:
                removal.remove_parts(self._url, self.uuid)

    def _point(self, data: bytes) -> None:
        self._fs.pipe_file(driver(self._url.parent / LATEST_NAME)[1], data)


def make_target(path: str | os.PathLike[str]) -> Target:
    """The target for a path or a URL such as ``s3://bucket/run/step_1000``."""
    location = as_location(path)
    return RemoteTarget(location) if isinstance(location, URL) else LocalTarget(location)


@contextmanager
def new_file(directory: str, name: str, num_bytes: int) -> Iterator[Callable[[memoryview], object]]:
    """A new file of known size in a directory that :meth:`Target.begin` has made, on any rank.

    Yields:
        What writes the next bytes. They are durable when the block has ended.
    """
    where = as_location(directory)
    if isinstance(where, URL):
        fs, path = driver(where / name)
        with reaching(where), _new_object(fs, path) as write:
            yield write
        return
    with inside(where) as folder, durable.new_file(where / name, num_bytes, folder) as write:
        yield write


@contextmanager
def _new_object(fs: Any, path: str) -> Iterator[Callable[[memoryview], object]]:
    """The same in a store. What was begun and not finished is given up, and no object comes of it.

    Leaving the file's own block would finish it in any case.
    """
    remote = fs.open(path, "wb")
    try:
        yield remote.write
        remote.close()
    except BaseException:
        remote.closed = True  # else its end would be written once nobody knows of it any more
        # What cannot be taken back is listed by inspect. Drivers without such uploads say
        # NotImplementedError or have nothing to do.
        with suppress(OSError, CheckpointError, NotImplementedError), reaching(path):
            remote.discard()
        raise


@contextmanager
def inside(directory: Path) -> Iterator[int]:
    """A directory that :meth:`Target.begin` has made, on any rank, by a descriptor.

    Raises:
        CheckpointWriteError: this rank does not see it, or finds a link there.
    """
    folders: list[int] = []
    try:
        try:
            folders.append(os.open(directory.parent, DIRECTORY))
            folders.append(os.open(directory.name, DIRECTORY, dir_fd=folders[0]))
        except OSError as error:
            raise CheckpointWriteError(
                f"this rank does not see {directory}, which another rank has made "
                f"({error.strerror}); all ranks must share one file system, so save to a directory "
                "that all of them see"
            ) from error
        yield folders[-1]
    finally:
        for folder in folders:
            os.close(folder)


# ---------------------------------------------------------------------- directories


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


def publish(hold: Hold, name: str, path: Path, *, replace: str = "") -> None:
    """Make a directory, whose files are durable, the one at ``path`` by one rename.

    Args:
        hold: of the temporary directory that it lies in.
        name: that it has there.
        replace: uuid of the save that replaces the checkpoint at ``path``; empty for none.

    Raises:
        CheckpointExistsError: something came to ``path`` while it was being written.
        CheckpointWriteError: another process has taken the temporary directory over.
    """
    hold.check()
    folder = os.open(name, DIRECTORY, dir_fd=hold.descriptor)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    refuse_existing(path, replace=bool(replace))
    aside = removal.put_aside(path, replace) if replace and os.path.lexists(path) else None
    try:
        # A directory can be renamed onto an empty one; that one would vanish unseen.
        refuse_existing(path, replace=False)
        os.rename(name, path, src_dir_fd=hold.descriptor)
    except OSError as error:
        if aside is not None and not os.path.lexists(path):
            os.rename(aside, path)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # it came in this very moment
            refuse_existing(path, replace=False)
        raise
    # From here on it is committed, whatever happens.
    try:
        durable.fsync(path.parent)
    except OSError as error:
        warn(
            f"{path} is committed, but the directory that it lies in could not be flushed to the "
            f"disk, so that a power failure could undo it: {error}"
        )
    problem = removal.remove(aside) if aside is not None else None
    if problem is not None:
        warn(f"{path} is committed, but what it has replaced is left: {problem}")
