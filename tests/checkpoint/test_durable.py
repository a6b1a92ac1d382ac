"""A new file, sent to the disk while it is written."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sharded_ema.checkpoint import durable
from sharded_ema.checkpoint.durable import make_directories, new_file

BLOCKS = [bytes([number]) * (100 + number) for number in range(20)]
SIZE = sum(map(len, BLOCKS))


def write_all(path: Path) -> None:
    with new_file(path, SIZE) as write:
        for block in BLOCKS:
            write(memoryview(block))


@pytest.mark.parametrize("flush", [1, 250, SIZE, 1 << 26])
def test_bytes(tmp_path: Path, flush: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "FLUSH_BYTES", flush)
    write_all(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"".join(BLOCKS)
    with pytest.raises(FileExistsError):
        write_all(tmp_path / "x")


def test_all_is_synced_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces from another thread, and once more when the last byte is there."""
    monkeypatch.setattr(durable, "FLUSH_BYTES", 250)
    sync, seen = os.fdatasync, []

    def noted(descriptor: int) -> None:
        sync(descriptor)
        seen.append((threading.current_thread().name, os.lseek(descriptor, 0, os.SEEK_CUR)))

    monkeypatch.setattr(os, "fdatasync", noted)
    write_all(tmp_path / "x")
    assert {name for name, _ in seen[:-1]} == {"flush"} and len(seen) > 1
    assert seen[-1] == (threading.current_thread().name, SIZE)


def test_small_files_need_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    write_all(tmp_path / "x")


def test_all_is_synced_where_no_thread_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while the interpreter ends, since Python 3.12."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(durable, "FLUSH_BYTES", 1)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    sync, seen = os.fdatasync, []

    def noted(descriptor: int) -> None:
        sync(descriptor)
        seen.append(os.lseek(descriptor, 0, os.SEEK_CUR))

    monkeypatch.setattr(os, "fdatasync", noted)
    write_all(tmp_path / "x")
    assert seen == [SIZE]
    assert (tmp_path / "x").read_bytes() == b"".join(BLOCKS)


@pytest.mark.parametrize("last", [False, True])
def test_an_error_of_the_disk_is_raised(
    tmp_path: Path, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells it once, to whoever syncs first: to a thread that nobody listens to."""
    monkeypatch.setattr(durable, "FLUSH_BYTES", SIZE if last else 1)
    sync, told = os.fdatasync, []

    def fails(descriptor: int) -> None:
        if not told:
            told.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write_all(tmp_path / "x")
    assert told


def test_nothing_goes_on_after_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that comes late would sync whatever file has the descriptor by then."""
    monkeypatch.setattr(durable, "FLUSH_BYTES", 1)
    sync, begun, ended = os.fdatasync, threading.Event(), []

    def held(descriptor: int) -> None:
        begun.set()
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        sync(descriptor)
        ended.append(name)

    monkeypatch.setattr(os, "fdatasync", held)
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "x", SIZE) as write:
        write(memoryview(BLOCKS[0]))
        begun.wait()
        raise KeyboardInterrupt
    assert ended == ["x"]
    assert not [thread for thread in threading.enumerate() if thread.name == "flush"]


def test_room_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(code: int) -> Callable[[], Callable[..., int]]:
        def fallocate(descriptor: int, mode: int, start: int, length: int) -> int:
            assert (mode, start, length) == (0, 0, SIZE)
            ctypes.set_errno(code)
            return -1

        return lambda: fallocate

    monkeypatch.setattr(durable, "_fallocate", says(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"), new_file(tmp_path / "x", SIZE):
        raise AssertionError("nothing may be written")
    # Where it cannot be had, nobody writes the file once more for it.
    monkeypatch.setattr(durable, "_fallocate", says(errno.EOPNOTSUPP))
    with new_file(tmp_path / "y", SIZE):
        assert not (tmp_path / "y").stat().st_size


def test_an_error_ends_the_writing_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file is not written to its end on a disk that has failed."""
    monkeypatch.setattr(durable, "FLUSH_BYTES", 1)

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fails)
    with (
        pytest.raises(OSError, match="Input/output error"),
        new_file(tmp_path / "x", SIZE) as write,
    ):
        write(memoryview(BLOCKS[0]))
        for thread in threading.enumerate():
            if thread.name == "flush":
                thread.join()
        write(memoryview(BLOCKS[1]))
        raise AssertionError("goes on")


def test_new_directories_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of each of them, in the one above it, and after it was made."""
    seen = []
    monkeypatch.setattr(
        durable, "fsync", lambda path: seen.append((path, sorted(p.name for p in path.iterdir())))
    )
    make_directories(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert seen == [(tmp_path, ["a"]), (tmp_path / "a", ["b"]), (tmp_path / "a" / "b", ["c"])]
    make_directories(tmp_path / "a" / "b")
    assert len(seen) == 3, "what was there is as durable as it was"
