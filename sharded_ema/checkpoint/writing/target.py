"""Where a checkpoint goes: a directory that is renamed, or objects under a URL.

A file system renames a directory at once, so everything is written beside the target first. Object
stores rename nothing at once: there the objects lie under their last names from the beginning, and
the manifest, which is written after all others, makes them a checkpoint.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from sharded_ema.checkpoint import durable, removal, retention
from sharded_ema.checkpoint.location import URL, as_location, driver, entries
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.checkpoint.reading.opened import is_part
from sharded_ema.errors import CheckpointExistsError, CheckpointWriteError, ConfigError


class Target(ABC):
    """What one rank, the coordinator, does with the place of a checkpoint.

    Attributes:
        directory: where all ranks write, once begun; ``None`` before and after.
        uuid: of the save that has begun.
    """

    directory: str | None = None
    uuid: str

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
    def settle(self, *, latest: bool, keep_last: int | None) -> None:
        """After the commit: let ``latest`` name it, remove old ones. What fails is warned of."""


class LocalTarget(Target):
    """A directory of a file system.

    Args:
        path: of the checkpoint to be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._occupied: removal.Occupied | None = None

    def check(self, *, replace: bool) -> None:
        removal.refuse_existing(self._path, replace=replace)

    def begin(self, *, replace: bool) -> str:
        staging, self._occupied = removal.begin(self._path, replace=replace)
        self.uuid = staging.name.rpartition("-")[2]
        self.directory = str(staging)
        return self.directory

    def write(self, name: str, data: bytes) -> None:
        assert self.directory is not None
        durable.write_durably(Path(self.directory, name), data)

    def publish(self, manifest: bytes, *, replace: bool) -> None:
        assert self.directory is not None
        self.write(MANIFEST_NAME, manifest)
        removal.publish(Path(self.directory), self._path, replace=replace)
        self._end()

    def abandon(self) -> None:
        if self.directory is not None:
            removal.remove(Path(self.directory))
            self._end()

    def _end(self) -> None:
        assert self._occupied is not None
        self._occupied.close()
        self.directory = self._occupied = None

    def settle(self, *, latest: bool, keep_last: int | None) -> None:
        retention.after_commit(
            self._path,
            latest=latest,
            keep_last=keep_last,
            write=removal.replace_durably,
            remove=removal.remove,
        )


class RemoteTarget(Target):
    """A prefix of an object store, or whatever else fsspec has a driver for.

    There are no locks: of two jobs that save to one URL at the same moment the later one may
    overwrite files of the earlier one. Their digests then tell that the checkpoint is damaged.

    Args:
        url: of the checkpoint to be.
    """

    def __init__(self, url: URL) -> None:
        self._url = url
        self._fs, self._path = driver(url)

    def check(self, *, replace: bool) -> None:
        if replace:
            raise ConfigError(
                f"replace=True needs a file system that renames, {self._url} does not; save under "
                "a new name, with keep_last to remove old checkpoints"
            )
        names = entries(self._url)
        foreign = {name for name in names if not is_part(name)}
        if MANIFEST_NAME in names or foreign or self._fs.isfile(self._path):
            raise CheckpointExistsError(
                f"{self._url} already exists and is left as it is; save to a new URL"
            )

    def begin(self, *, replace: bool) -> str:
        self.check(replace=replace)
        try:
            # Parts without a manifest: a save that was killed.
            self._remove(entries(self._url))
            self._fs.makedirs(self._path, exist_ok=True)
        except OSError as error:
            raise CheckpointWriteError(f"cannot write to {self._url}: {error}") from error
        self.uuid = uuid4().hex
        self.directory = self._url
        return self._url

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self._path}/{name}", data)

    def publish(self, manifest: bytes, *, replace: bool) -> None:
        self.check(replace=replace)
        self.write(MANIFEST_NAME, manifest)
        self.directory = None

    def abandon(self) -> None:
        if self.directory is not None:
            self.directory = None
            self._remove(entries(self._url))

    def _remove(self, names: set[str]) -> None:
        # Without the manifest first it is no checkpoint any more, whatever is left of it.
        for name in sorted(names, key=lambda name: name != MANIFEST_NAME):
            self._fs.rm_file(f"{self._path}/{name}")
        # Where directories are real (drivers without any raise NotImplementedError); never the
        # bucket itself.
        if "/" in self._path.strip("/"):
            with suppress(OSError, NotImplementedError):
                self._fs.rmdir(self._path)

    def settle(self, *, latest: bool, keep_last: int | None) -> None:
        retention.after_commit(
            self._url,
            latest=latest,
            keep_last=keep_last,
            write=lambda url, data: self._fs.pipe_file(driver(url)[1], data),
            remove=lambda url: RemoteTarget(url).remove(),
        )

    def remove(self) -> None:
        """Remove the checkpoint that is there."""
        self._remove(entries(self._url))


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
        with fs.open(path, "wb") as remote:
            yield remote.write
        return
    with durable.new_file(where / name, num_bytes) as write:
        yield write
