"""Who is at work where: a temporary directory says who holds it.

In it lies ``holder-<uuid>.json``: host, boot id, process and its start. While the process is at
work, a thread touches the file every few seconds. Nobody asks for locks, which many file systems
grant to each machine by itself. Instead:

- on the machine of the holder, its process is looked up: dead or alive, that is certain;
- elsewhere, what counts is the time of the last touch by the clock of the file system: it is
  compared with the time of a file just made there, never with the clock of this machine.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sharded_ema.checkpoint.checked_json import load_json
from sharded_ema.checkpoint.names import holder_name, new_uuid, temporary, unfinished_holder_name
from sharded_ema.errors import CheckpointError, CheckpointWriteError

#: Seconds between two touches.
BEAT_SECONDS = 10.0
#: Seconds without one after which a holder on another machine counts as dead: many touches, and
#: more than an NFS client may remember an old time of a file.
DEAD_AFTER_SECONDS = 300.0

#: To open a directory in which nobody has planted a link under its name.
DIRECTORY = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
_MAX_HOLDER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a directory.

    Attributes:
        uuid: of the holding; that of the directory, unless it was taken over.
        host: name of the machine.
        boot_id: of its kernel; ``""`` where there is none.
        namespace: of process numbers, since containers on one machine have their own.
        pid: number of the process.
        started: when the process did, in ticks since the boot; 0 if unknown.
    """

    uuid: str
    host: str
    boot_id: str
    namespace: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_alive(self) -> bool | None:
        """Whether its process is at work; ``None`` if that cannot be seen from this machine."""
        here = _here()
        if not self.boot_id or (self.host, self.boot_id, self.namespace) != here:
            return None
        if self.pid == os.getpid():
            hold = _held.get(self.uuid)
            return hold is not None and not hold.closed
        return _process(self.pid) == self.started


def _here() -> tuple[str, str, str]:
    return socket.gethostname(), _boot_id(), _namespace()


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def _process(pid: int) -> int | None:
    """When a process of this machine has started; ``None`` if there is none, or it is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])


# ---------------------------------------------------------------------- holding


# Of this process, by uuid. What nobody knows of any more is held by nobody.
_held: weakref.WeakValueDictionary[str, Hold] = weakref.WeakValueDictionary()
_lock = threading.Lock()
_beating: threading.Thread | None = None


class Hold:
    """A directory that this process holds until it is closed.

    Args:
        place: a temporary path of which nothing is there yet.

    Attributes:
        place: where the directory lies.
        uuid: of the holding.
        closed: whether it has ended.

    Raises:
        OSError: the directory cannot be made.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.uuid = new_uuid()
        self.closed = False
        # The directory and its marker; closed with the object at the latest.
        self._descriptors: list[int] = []
        self._pid = os.getpid()
        weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def make(cls, place: Path) -> Hold:
        """Make the directory, which has its marker as soon as anybody may find it held.

        A directory in which there is no marker yet may be removed by anybody; it is made anew.
        """
        hold = cls(place)
        _held[hold.uuid] = hold
        while True:
            try:
                place.mkdir()
                hold._enter()
                hold._mark()
                break
            except FileNotFoundError:
                hold._leave()
                with suppress(OSError):  # it may be there still, without what was in it
                    place.rmdir()
            except BaseException:
                hold.close()
                with suppress(OSError):  # what cannot be removed now, the next save removes
                    for name in (unfinished_holder_name(hold.uuid), holder_name(hold.uuid)):
                        (place / name).unlink(missing_ok=True)
                    place.rmdir()
                raise
            if not place.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place.parent))
        _begin_to_beat()
        return hold

    @classmethod
    def take_over(cls, place: Path, dead: Holder, identity: tuple[int, int]) -> Hold | None:
        """Hold a directory that a dead process has left; ``None`` if another one was faster.

        Args:
            dead: who has held it.
            identity: device and inode of the directory that was looked at.
        """
        hold = cls(place)
        _held[hold.uuid] = hold
        try:
            hold._enter()
            status = os.fstat(hold.descriptor)
            if (status.st_dev, status.st_ino) != identity:
                return None
            # Of several that try, one can rename it.
            os.rename(
                holder_name(dead.uuid),
                holder_name(hold.uuid),
                src_dir_fd=hold.descriptor,
                dst_dir_fd=hold.descriptor,
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        hold._mark()
        _begin_to_beat()
        return hold

    @property
    def descriptor(self) -> int:
        """Of the directory, whatever name it has by now."""
        return self._descriptors[0]

    def _enter(self) -> None:
        self._descriptors.append(os.open(self.place, DIRECTORY))

    def _leave(self) -> None:
        _close_all(self._descriptors)

    def _mark(self) -> None:
        namespace = _here()
        pid = os.getpid()
        holder = Holder(self.uuid, *namespace, pid, _process(pid) or 0)
        new = unfinished_holder_name(self.uuid)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(new, flags, 0o666, dir_fd=self.descriptor)
        self._descriptors.append(descriptor)
        os.write(descriptor, json.dumps(asdict(holder)).encode())
        os.rename(
            new, holder_name(self.uuid), src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor
        )

    def names(self) -> set[str]:
        """What is in it."""
        with os.scandir(self.descriptor) as found:
            return {entry.name for entry in found}

    def beat(self) -> None:
        """Say that this process is at work."""
        if not self.closed and self._pid == os.getpid():
            with suppress(OSError, IndexError):  # the next one may come through
                os.utime(self._descriptors[1])

    def move(self, place: Path) -> None:
        """Rename the directory, onto nothing or an empty one.

        Raises:
            OSError: there is something.
        """
        os.rename(self.place, place)
        self.place = place

    @property
    def is_mine(self) -> bool:
        """Whether the directory has its name, and this process holds it."""
        if self.closed:
            return False
        try:
            mine = os.stat(holder_name(self.uuid), dir_fd=self.descriptor, follow_symlinks=False)
            there = os.stat(self.place, follow_symlinks=False)
            same = os.path.samestat(there, os.fstat(self.descriptor))
            return same and os.path.samestat(mine, os.fstat(self._descriptors[1]))
        except (OSError, IndexError):
            return False

    def check(self) -> None:
        """Refuse to go on if the directory has been taken for that of a dead process.

        Raises:
            CheckpointWriteError: see above.
        """
        if self.is_mine:
            return
        raise CheckpointWriteError(
            f"{self.place} was taken away from this process, which has given no sign of life for "
            f"{DEAD_AFTER_SECONDS:.0f} s or more, or by somebody's hand; nothing was published"
        )

    def close(self) -> None:
        """Hold it no longer; harmless if done before."""
        self.closed = True
        _held.pop(self.uuid, None)
        _close_all(self._descriptors)


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _begin_to_beat() -> None:
    global _beating
    with _lock:
        if _beating is not None and _beating.is_alive():
            return
        _beating = threading.Thread(target=_beat, name="heartbeat", daemon=True)
        # No thread starts once the interpreter ends, since Python 3.12. What is still being written
        # then is a sign of life as well.
        with suppress(RuntimeError):
            _beating.start()


def _beat() -> None:
    global _beating
    while True:
        time.sleep(BEAT_SECONDS)
        with _lock:
            holds = list(_held.values())
            if not holds:
                _beating = None
                return
        for hold in holds:
            hold.beat()
        del holds, hold  # which would keep them


# ---------------------------------------------------------------------- looking


def read_holder(descriptor: int, uuid: str) -> Holder | None:
    """Who holds an open directory, as its marker of this uuid says; ``None`` if that is damaged."""
    try:
        marker = os.open(
            holder_name(uuid),
            os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
            dir_fd=descriptor,
        )
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(marker).st_mode):
            return None
        said = load_json(os.read(marker, _MAX_HOLDER_BYTES), "a marker")
    except (OSError, CheckpointError):
        return None
    finally:
        os.close(marker)
    fields: dict[str, Any] = {name: said.get(name) for name in Holder.__slots__}
    numbers, texts = ("pid", "started"), ("uuid", "host", "boot_id", "namespace")
    if not all(type(fields[n]) is int for n in numbers):
        return None
    if not all(isinstance(fields[n], str) for n in texts) or fields["uuid"] != uuid:
        return None
    return Holder(**fields)


class Clock:
    """The clock of the file system in which a directory lies, read when it is first asked for.

    Args:
        folder: the directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._now: int | None = None

    def now(self) -> int:
        """Nanoseconds: the time of a file just made there.

        Raises:
            OSError: none can be made.
        """
        if self._now is None:
            probe = temporary(self._folder / "clock")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(probe, flags, 0o600)
            try:
                os.utime(descriptor)
                self._now = os.fstat(descriptor).st_mtime_ns
            finally:
                os.close(descriptor)
                with suppress(FileNotFoundError):
                    probe.unlink()
        return self._now

    def has_been_silent(self, last: int) -> bool:
        """Whether the last sign of life, in nanoseconds of this clock, is that of the dead."""
        try:
            return self.now() - last > DEAD_AFTER_SECONDS * 1e9
        except OSError:  # nobody can tell
            return False
