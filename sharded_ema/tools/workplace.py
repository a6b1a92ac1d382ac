"""Where a consolidation works, and what a later one takes over from it if it is killed.

``<target>.tmp-<plan>`` lies beside the target; ``plan`` is a digest of everything that decides on
the bytes of the output, so the same command finds it again and no other one does. Inside, finished
files wait in ``model/`` and ``journal.jsonl`` has a line for each of them: a file has its name only
once it is on disk, and counts only once its line is. ``model/`` becomes the target by one rename.

Whoever works there holds a lock on the directory, which the system drops when the process dies.
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
from uuid import uuid4

from sharded_ema.checkpoint import removal
from sharded_ema.checkpoint.durable import replace_durably
from sharded_ema.checkpoint.files import Location
from sharded_ema.checkpoint.names import JOURNAL_NAME, MODEL_DIRECTORY, is_plain_name, temporary
from sharded_ema.checkpoint.reading.stream import verify_file
from sharded_ema.checkpoint.writing.target import publish
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointExistsError,
    CheckpointWriteError,
    ConfigError,
)


@dataclass(frozen=True, slots=True)
class Finished:
    """A line of the journal.

    Attributes:
        file: name of an output file.
        bytes: its size.
        digest: its xxh3-128 in hex.
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

    Leaving it removes the directory. Only a process that dies, or is interrupted from the keyboard,
    leaves it to the next one.

    Args:
        target: directory to be made.
        plan: hex digest of 128 bits; see above. ``None`` for work that nobody goes on with, of
            which an interruption leaves nothing either.

    Attributes:
        finished: what an earlier run has left, checked byte for byte, by file name.
        model: directory to write into.

    Raises:
        CheckpointExistsError: another process is at work on the same target.
        OSError: the directory cannot be made.
    """

    def __init__(self, target: Path, plan: str | None) -> None:
        self._target = target
        self._goes_on = plan is not None
        self._plan = plan or uuid4().hex
        self._path = temporary(target, self._plan)
        self.model = self._path / MODEL_DIRECTORY
        self._lock = threading.Lock()
        removal.remove_workplaces(target, but=self._path)
        self._descriptor = self._occupy()
        try:
            self.finished = {line.file: line for line in self._take_over()}
        except OSError:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._goes_on or kind is None or issubclass(kind, Exception):
            removal.remove(self._path)
        os.close(self._descriptor)

    def record(self, file: str, size: int, digest: str, unchecked: int, overflowed: int) -> None:
        """Note, for good, that a file is whole and on disk; see :class:`Finished`."""
        if not self._goes_on:
            return
        line = Finished(file, size, digest, self._plan, unchecked, overflowed)
        with self._lock:
            self.finished[file] = line
            with open(self._path / JOURNAL_NAME, "ab") as journal:
                journal.write(_line(line))
                journal.flush()
                os.fsync(journal.fileno())

    def publish(self) -> None:
        """Make what was written the target.

        Raises:
            CheckpointExistsError: something came there in the meantime.
        """
        if self._target.is_dir() and not any(self._target.iterdir()):
            removal.remove_empty(self._target)
        try:
            publish(self.model, self._target, replace=False)
        except CheckpointExistsError:
            raise _taken(self._target) from None

    def _occupy(self) -> int:
        """Make the directory, or take over one that a dead process has left; the lock on it."""
        while True:
            self._path.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # removed by whoever held it
                continue
            if removal.lock_alone(descriptor) is False:
                os.close(descriptor)
                raise CheckpointExistsError(
                    f"another process is consolidating into {self._target} (in {self._path}); "
                    "nothing was written"
                )
            try:
                self.model.mkdir(exist_ok=True)
                if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                    return descriptor
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _take_over(self) -> list[Finished]:
        """What is finished; whatever else lies there goes."""
        journal = self._path / JOURNAL_NAME
        kept = []
        for line in _read(journal, self._plan):
            path = self.model / line.file
            try:
                verify_file(path, line.digest)
            except CheckpointCorruptError:  # or missing
                continue
            kept.append(line)
        names = {line.file for line in kept}
        removal.remove_files([path for path in self.model.iterdir() if path.name not in names])
        replace_durably(journal, b"".join(map(_line, kept)))
        return kept


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


def _line(finished: Finished) -> bytes:
    return f"{json.dumps(asdict(finished))}\n".encode()


def _read(journal: Path, plan: str) -> list[Finished]:
    """The lines of a journal that are whole and belong to the plan."""
    found = []
    lines = journal.read_bytes().splitlines() if journal.is_file() else []
    for line in lines:
        with suppress(ValueError, TypeError):  # the last one may be half written
            finished = Finished(**json.loads(line))
            if finished.source == plan and is_plain_name(finished.file):
                found.append(finished)
    return found
