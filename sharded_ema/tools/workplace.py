"""Where a consolidation works, and what a later one takes over from it if it is killed.

``<target>.tmp-<plan>`` lies beside the target; ``plan`` is a digest of everything that decides on
the bytes of the output, so the same command finds it again and no other one does. Inside, finished
files wait in ``model/`` and ``journal.jsonl`` has a line for each of them: a file has its name only
once it is on disk, and counts only once its line is. ``model/`` becomes the target by one rename.

Whoever works there holds the directory, see :mod:`sharded_ema.checkpoint.holding`; the next one
takes it over once that process is dead. One with a link in it, or of another user, is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from sharded_ema.checkpoint import removal
from sharded_ema.checkpoint.durable import make_directories, write_durably
from sharded_ema.checkpoint.files import Location
from sharded_ema.checkpoint.holding import DEAD_AFTER_SECONDS, DIRECTORY, Hold
from sharded_ema.checkpoint.names import (
    JOURNAL_NAME,
    MODEL_DIRECTORY,
    is_plain_name,
    new_uuid,
    temporary,
)
from sharded_ema.checkpoint.writing.target import publish
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointExistsError,
    CheckpointWriteError,
    ConfigError,
    EMAError,
)
from sharded_ema.tools.provenance import verify_written

# Lines of a journal take some 250 bytes.
_MAX_JOURNAL_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Finished:
    """A line of the journal.

    Attributes:
        file: name of an output file.
        bytes: its size.
        digest: its xxh3-128 in hex, as it says it itself; see
            :mod:`sharded_ema.tools.provenance`.
        source: digest of what it was made from and how: the plan's.
        unchecked, overflowed: see :class:`~sharded_ema.tools.write.Tally`.
    """

    file: str
    bytes: int
    digest: str
    source: str
    unchecked: int
    overflowed: int


class Workplace:
    """The directory in which one consolidation works; a context manager.

    Leaving it removes the directory. A process that dies, is interrupted from the keyboard, or
    meets an error of the disk when some files are finished, leaves it to the next one.

    Args:
        target: directory to be made.
        plan: hex digest of 128 bits; see above. ``None`` for work that nobody goes on with, of
            which an interruption leaves nothing either.

    Attributes:
        finished: what an earlier run has left, checked byte for byte, by file name.
        model: directory to write into.

    Raises:
        CheckpointExistsError: another process is at work on the same target.
        CheckpointWriteError: somebody else's directory has the name of this one.
        OSError: the directory cannot be made.
    """

    def __init__(self, target: Path, plan: str | None) -> None:
        self._target = target
        self._goes_on = plan is not None
        self._plan = plan or new_uuid()
        self._path = temporary(target, new_uuid(self._plan))
        self._lock = threading.Lock()
        self._model_folder: int | None = None
        make_directories(target.parent)
        removal.remove_workplaces(target, but=self._path)
        self._hold = self._occupy()
        try:
            if MODEL_DIRECTORY not in self._hold.names():
                os.mkdir(MODEL_DIRECTORY, dir_fd=self._hold.descriptor)
            self._model_folder = os.open(MODEL_DIRECTORY, DIRECTORY, dir_fd=self._hold.descriptor)
            # Whatever takes the name of the directory, files are written into this one.
            self.model = _by_descriptor(self._model_folder, self._path / MODEL_DIRECTORY)
            self.finished = {line.file: line for line in self._take_over()}
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        if self._model_folder is not None:
            os.close(self._model_folder)
            self._model_folder = None
        self._hold.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = error.filename.replace(
                str(self.model), str(self._path / MODEL_DIRECTORY)
            )
        # What the disk refuses today may work tomorrow: what is finished stays, as after a kill.
        of_the_disk = isinstance(error, CheckpointWriteError) or not isinstance(error, EMAError)
        interrupted = kind is not None and not issubclass(kind, Exception)
        stays = self._goes_on and (interrupted or (error and of_the_disk and self.finished))
        if not stays:
            removal.discard(self._hold)
        self._close()

    def record(self, file: str, size: int, digest: str, unchecked: int, overflowed: int) -> None:
        """Note, for good, that a file is whole and on disk; see :class:`Finished`."""
        if not self._goes_on:
            return
        line = Finished(file, size, digest, self._plan, unchecked, overflowed)
        with self._lock:
            self.finished[file] = line
            self._hold.check()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            journal = os.open(JOURNAL_NAME, flags, 0o666, dir_fd=self._hold.descriptor)
            try:
                os.write(journal, as_line(line))
                os.fsync(journal)
            finally:
                os.close(journal)

    def publish(self) -> None:
        """Make what was written the target.

        Raises:
            CheckpointExistsError: something came there in the meantime.
        """
        if self._target.is_dir() and not any(self._target.iterdir()):
            removal.remove_empty(self._target)
        try:
            publish(self._hold, MODEL_DIRECTORY, self._target)
        except CheckpointExistsError:
            raise _taken(self._target) from None

    def _occupy(self) -> Hold:
        """Make the directory, or take over one that a dead process has left."""
        found = removal.occupy(self._path, self._target)
        if isinstance(found, Hold):
            return found
        if found.foreign:
            raise CheckpointWriteError(
                f"{self._path} is where this would be made, but {found.foreign}; nothing was "
                "touched. Look at it and remove it, or write to another path"
            )
        raise CheckpointExistsError(
            f"another process is consolidating into {self._target}"
            f"{f' ({found.holder})' if found.holder else ''}, in {self._path}; nothing was "
            f"written. Of a process that died on another machine that is known "
            f"{DEAD_AFTER_SECONDS:.0f} s later"
        )

    def _take_over(self) -> list[Finished]:
        """What is finished; whatever else lies there goes."""
        kept = []
        for line in _read(self._hold, self._plan):
            if is_whole(self.model / line.file, line):
                kept.append(line)
        names = {line.file for line in kept}
        for path in list(self.model.iterdir()):
            if path.name not in names:
                removal.remove_inside(path)
        if not self._goes_on:
            return kept
        new = f"{JOURNAL_NAME}-new"
        if new in self._hold.names():
            os.unlink(new, dir_fd=self._hold.descriptor)
        write_durably(Path(new), b"".join(map(as_line, kept)), self._hold.descriptor)
        os.rename(
            new,
            JOURNAL_NAME,
            src_dir_fd=self._hold.descriptor,
            dst_dir_fd=self._hold.descriptor,
        )
        os.fsync(self._hold.descriptor)
        return kept


def is_whole(path: Path, line: Finished) -> bool:
    """Whether a file is there, and what the journal says of it."""
    try:
        verify_written(path, line.digest)
    except CheckpointCorruptError:  # or missing
        return False
    return True


def _by_descriptor(folder: int, path: Path) -> Path:
    """A path that leads to an open directory, whatever its own path leads to by now."""
    found = Path(f"/proc/self/fd/{folder}")
    return found if found.is_dir() else path


def check_target(target: Path, source: Location) -> None:
    """Refuse a target that is taken, or that lies inside the source.

    Raises:
        CheckpointExistsError, ConfigError: see above.
    """
    if isinstance(source, Path) and target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} lies inside the checkpoint {source}, which must not change")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        removal.remove_workplaces(target)
        raise _taken(target)


def _taken(target: Path) -> CheckpointExistsError:
    return CheckpointExistsError(f"{target} already exists; nothing was written")


def check_space(target: Path, needed: int) -> None:
    """Refuse before writing what the disk cannot hold.

    Raises:
        CheckpointWriteError: it has less than ``needed`` bytes free.
    """
    folder = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointWriteError(f"{target} needs {needed:,} bytes, {folder} has {free:,} free")


def as_line(finished: Finished) -> bytes:
    """A line of the journal."""
    return f"{json.dumps(asdict(finished))}\n".encode()


def _read(hold: Hold, plan: str) -> list[Finished]:
    """The lines of the journal in a directory that are whole and belong to the plan."""
    if JOURNAL_NAME not in hold.names():
        return []
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(JOURNAL_NAME, flags, dir_fd=hold.descriptor), "rb") as opened:
        return parse_journal(opened.read(_MAX_JOURNAL_BYTES), plan)


def parse_journal(data: bytes, plan: str) -> list[Finished]:
    """The lines of a journal that are whole and belong to the plan."""
    found: list[Finished] = []
    for line in data.splitlines():
        with suppress(ValueError, TypeError):  # the last one may be half written
            finished = Finished(**json.loads(line))
            if finished.source == plan and is_plain_name(finished.file):
                found.append(finished)
    return found
