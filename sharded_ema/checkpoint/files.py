"""Opening the files of a checkpoint: regular files inside its directory and nothing else."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from sharded_ema.checkpoint.location import URL, Location, driver
from sharded_ema.errors import CheckpointCorruptError, CheckpointError

_MAX_NAME_BYTES = 255


class OpenFile(ABC):
    """A file to read at any position; a context manager.

    Attributes:
        location: of the file.
        size: in bytes.
    """

    def __init__(self, location: Location, size: int) -> None:
        self.location = location
        self.size = size

    def read_at(self, view: memoryview, position: int) -> int:
        """Read bytes from ``position`` on; returns how many, 0 at the end of the file.

        Raises:
            CheckpointCorruptError: the disk cannot read them.
        """
        try:
            return self._read_at(view, position)
        except OSError as error:
            raise CheckpointCorruptError(
                f"{self.location} cannot be read at byte {position}: {error.strerror or error}"
            ) from error

    def fill(self, view: memoryview, position: int) -> None:
        """Read as many bytes as ``view`` has.

        Raises:
            CheckpointCorruptError: the file ends before.
        """
        while view.nbytes:
            count = self.read_at(view, position)
            if not count:
                raise CheckpointCorruptError(
                    f"{self.location} ends at byte {position}, {view.nbytes} bytes are missing"
                )
            view = view[count:]
            position += count

    def read(self, position: int, num_bytes: int) -> bytes:
        """These bytes, or as many as there are."""
        data = bytearray(max(0, min(num_bytes, self.size - position)))
        if data:
            self.fill(memoryview(data), position)
        return bytes(data)

    @abstractmethod
    def _read_at(self, view: memoryview, position: int) -> int: ...

    @abstractmethod
    def close(self) -> None:
        """Give up what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


class _LocalFile(OpenFile):
    def __init__(self, location: Location, descriptor: int, size: int) -> None:
        super().__init__(location, size)
        self._descriptor = descriptor

    def _read_at(self, view: memoryview, position: int) -> int:
        return os.preadv(self._descriptor, [view], position)

    def close(self) -> None:
        os.close(self._descriptor)


class _RemoteFile(OpenFile):
    def __init__(self, location: Location, file: Any, size: int) -> None:
        super().__init__(location, size)
        self._file = file

    def _read_at(self, view: memoryview, position: int) -> int:
        if position >= self.size:
            return 0
        self._file.seek(position)
        return int(self._file.readinto(view))

    def close(self) -> None:
        self._file.close()


def open_regular(location: Location) -> OpenFile:
    """A regular file, or an object under a URL, to read.

    Raises:
        CheckpointCorruptError: it is missing, or a directory, FIFO, socket or device.
        CheckpointError: it cannot be opened.
    """
    if isinstance(location, URL):
        return _open_remote(location)
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for somebody to write.
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorruptError(f"{location} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{location} cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointCorruptError(f"{location} is not a regular file")
    return _LocalFile(location, descriptor, status.st_size)


def _open_remote(url: URL) -> OpenFile:
    fs, path = driver(url)
    try:
        return _RemoteFile(url, fs.open(path, "rb"), int(fs.size(path)))
    except FileNotFoundError:
        raise CheckpointCorruptError(f"{url} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{url} cannot be opened: {error}") from error


def read_whole(location: Location, limit: int) -> bytes:
    """The content of a small file.

    Args:
        limit: bytes; a larger file is not read.

    Raises:
        CheckpointCorruptError: it is missing, no regular file, or larger.
    """
    with open_regular(location) as file:
        if file.size > limit:
            raise CheckpointCorruptError(
                f"{location} has {file.size} bytes, more than the {limit} that it may have"
            )
        return file.read(0, file.size)


def is_plain_name(name: object) -> bool:
    """Whether a value can be the name of a file, and stays inside the directory it is joined to."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    try:
        return len(os.fsencode(name)) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def inside(root: Location, name: str) -> Location:
    """Where a file of the checkpoint lies.

    Raises:
        CheckpointCorruptError: the name, or a link that has it, leads out of the directory.
    """
    path = root / name
    if isinstance(root, URL) or isinstance(path, URL):
        if not is_plain_name(name):
            raise CheckpointCorruptError(f"{root}: {name!r} is no name of a file in it")
        return path
    try:
        leaves = "\0" in name or not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, names that cannot be
        leaves = True
    if leaves:
        raise CheckpointCorruptError(f"{root}: the file name {name!r} leads out of the directory")
    return path
