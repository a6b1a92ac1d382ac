"""Opening the files of a checkpoint: regular files inside its directory and nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sharded_ema.errors import CheckpointCorruptError, CheckpointError

_MAX_NAME_BYTES = 255


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a regular file with.

    Raises:
        CheckpointCorruptError: it is missing, or a directory, FIFO, socket or device.
        CheckpointError: it cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for somebody to write.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointCorruptError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointCorruptError(f"{path} is not a regular file")
    return descriptor


def read_at(descriptor: int, view: memoryview, position: int, path: Path) -> int:
    """Read bytes of an open file from ``position`` on; returns how many, 0 at its end.

    Raises:
        CheckpointCorruptError: the disk cannot read them.
    """
    try:
        return os.preadv(descriptor, [view], position)
    except OSError as error:
        raise CheckpointCorruptError(
            f"{path} cannot be read at byte {position}: {error.strerror}"
        ) from error


def read_whole(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a small file.

    Args:
        limit: bytes; a larger file is not read.

    Raises:
        CheckpointCorruptError: it is missing, no regular file, or larger.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointCorruptError(
                f"{path} has {size} bytes, more than the {limit} that it may have"
            )
        return file.read()


def is_plain_name(name: object) -> bool:
    """Whether a value can be the name of a file, and stays inside the directory it is joined to."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    try:
        return len(os.fsencode(name)) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def inside(root: Path, name: str) -> Path:
    """The path of a file of the checkpoint.

    Raises:
        CheckpointCorruptError: the name, or a link that has it, leads out of the directory.
    """
    path = root / name
    try:
        leaves = "\0" in name or not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, names that cannot be
        leaves = True
    if leaves:
        raise CheckpointCorruptError(f"{root}: the file name {name!r} leads out of the directory")
    return path
