"""Files and names that a power failure does not take away again."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from sharded_ema.checkpoint.names import temporary

#: So much of a file waits in memory before its way to the disk begins.
FLUSH_BYTES = 1 << 26


@contextmanager
def new_file(
    path: Path, num_bytes: int, folder: int | None = None
) -> Iterator[Callable[[memoryview], None]]:
    """Write a new file, whose bytes go to the disk while the next ones are being made.

    Args:
        num_bytes: its size, at least 1.
        folder: descriptor of the directory to open its name in, whatever its path leads to by now.

    Yields:
        What writes the next bytes. They are durable when the block has ended.

    Raises:
        FileExistsError: there is such a file.
        OSError: the disk is full or fails, at a write or at the end of the block.
    """
    with open(path, "xb", buffering=0, opener=_opener(folder)) as file:
        descriptor = file.fileno()
        # Room first: a full disk is found before the work, and blocks need no allocation.
        _allocate(descriptor, num_bytes)
        flush = _Flush(descriptor)
        waiting = 0

        def write(data: memoryview) -> None:
            nonlocal waiting
            waiting += data.nbytes
            while data.nbytes:
                data = data[os.write(descriptor, data) :]
            if waiting >= FLUSH_BYTES and flush.begin():
                waiting = 0

        try:
            yield write
        finally:
            flush.wait()  # the thread must not meet another file under this descriptor
        flush.check()
        _sync(descriptor)


def _opener(folder: int | None) -> Callable[[str, int], int]:
    def open_here(path: str, flags: int) -> int:
        name = path if folder is None else Path(path).name
        return os.open(name, flags | os.O_NOFOLLOW, 0o666, dir_fd=folder)

    return open_here


def _sync(descriptor: int) -> None:
    """Wait until the bytes of a file are on disk."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:  # macOS, whose call waits for the times of the file as well
        os.fsync(descriptor)


@cache
def _fallocate() -> Any:
    """The system's call; ``None`` where there is none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate64
    except (AttributeError, OSError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


def _allocate(descriptor: int, num_bytes: int) -> None:
    """Reserve room for a file where the file system can.

    The call of POSIX would write the whole file where it cannot.

    Raises:
        OSError: the disk is full.
    """
    call = _fallocate()
    if call is None or not call(descriptor, 0, 0, num_bytes):
        return
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        raise OSError(code, os.strerror(code))


class _Flush:
    """What is written on its way to the disk, in a thread, one at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def begin(self) -> bool:
        """Send to the disk what is there, unless the last time is still going on.

        Raises:
            OSError: the last time failed.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        self.check()
        # No pool: those take no work any more once the interpreter waits for its threads, which
        # is when a save in the background may be at work.
        thread = threading.Thread(target=self._run, name="flush")
        try:
            thread.start()
        except RuntimeError:  # nor does a new thread start then, since Python 3.12
            return True
        self._thread = thread
        return True

    def wait(self) -> None:
        """Return when nothing is going on."""
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raise what went wrong; a disk says that only once."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            _sync(self._descriptor)
        except OSError as error:
            self._error = error


def write_durably(path: Path, data: bytes, folder: int | None = None) -> None:
    """Write a new file and wait until it is on disk.

    Args:
        folder: see :func:`new_file`.
    """
    with new_small_file(path, folder) as file:
        file.write(data)


@contextmanager
def new_small_file(path: Path, folder: int | None = None) -> Iterator[BinaryIO]:
    """A new file to write; it is on disk when the block has ended.

    Args:
        folder: see :func:`new_file`.
    """
    with open(path, "xb", opener=_opener(folder)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old bytes or the new ones."""
    new = temporary(path)
    write_durably(new, data)
    new.replace(path)
    fsync(path.parent)


def make_directories(path: Path) -> None:
    """Make a directory and those above it that are not there, each of them durably."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        if path == path.parent:
            break
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
