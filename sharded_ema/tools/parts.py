"""One consolidation by several processes, on one machine or on many that share a directory.

Each output file is a piece of work of its own. Nobody is told what to do: a process takes the next
file that is not there and that nobody is at work on, and each of them begins at another one. So the
bytes do not depend on how many there are, and one that died is taken up by the others, or by itself
when it comes again. Who finds that all files are there makes the target of them.

``<target>.tmp-<digits>/model/`` lies beside the target. In it ``<file>/`` holds a finished file and
its line of a journal, and ``<file>.tmp-<digits>`` is where somebody is writing one, which works as
for a whole consolidation (:mod:`.workplace`).
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sharded_ema.checkpoint import durable, removal
from sharded_ema.checkpoint.names import JOURNAL_NAME, MODEL_DIRECTORY, new_uuid, temporary
from sharded_ema.checkpoint.safetensors import read_header
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointWriteError,
    ConfigError,
)
from sharded_ema.tools.contents import Average
from sharded_ema.tools.huggingface import Model
from sharded_ema.tools.plan import Plan, group_bytes
from sharded_ema.tools.workplace import (
    Finished,
    Workplace,
    as_line,
    check_space,
    is_whole,
    parse_journal,
)
from sharded_ema.tools.write import Blocks, Tally, Written, run_jobs, write_file, write_models

FORMAT = "safetensors"
#: Seconds between two looks at what others are still writing.
LOOK_SECONDS = 0.5
# What a file system says that has no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV)


@dataclass(frozen=True, slots=True)
class Part:
    """Which of several processes this one is.

    Attributes:
        index: from 0 on.
        count: how many there are.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From ``"I/N"``.

        Raises:
            ConfigError: it is something else, or ``I`` is not below ``N``.
        """
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
            return cls(int(index), int(count))
        raise ConfigError(f"part must be I/N with I from 0 to N - 1, such as 0/4, got {text!r}")

    @classmethod
    def of_torchrun(cls, environment: Mapping[str, str]) -> str | None:
        """The part of a process that torchrun has started; ``None`` for any other."""
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        return f"{environment['RANK']}/{environment['WORLD_SIZE']}"

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Names, beginning where this process does."""
        found = list(names)
        first = len(found) * self.index // self.count
        return found[first:] + found[:first]


def is_made(plan: Plan, target: Path) -> bool:
    """Whether a directory has the files of a plan already, as their headers say."""
    for folder, texts in plan.headers.items():
        for name, group in plan.files.items():
            try:
                tensors, said, _ = read_header(target / folder / name)
            except CheckpointError:
                return False
            found = [(key, tensor.dtype, tensor.shape) for key, tensor in tensors.items()]
            if found != [o.described(FORMAT) for o in group] or not texts.items() <= said.items():
                return False
    return True


def write_shared(
    plan: Plan,
    target: Path,
    blocks: Blocks,
    *,
    inputs: Sequence[Average],
    like: Model | None,
    jobs: int,
    progress: bool,
    part: Part,
) -> Written:
    """Write a model together with other processes that do the same; returns when it is there.

    Args:
        inputs, like, jobs, progress: see :func:`~sharded_ema.tools.write.write_models`.

    Returns:
        What became of the plan. Only who has published it knows of all files; for the others
        ``copied`` and ``tally`` are of nothing.

    Raises:
        CheckpointCorruptError: an input is damaged.
        CheckpointExistsError, CheckpointWriteError: something else is in the way, or the disk is
            full.
    """
    shared = _Shared(plan, target)
    earlier = {name for name in plan.files if shared.is_done(name)}
    taken_over = len(earlier)
    left = sum(group_bytes(group) for name, group in plan.files.items() if name not in earlier)
    check_space(target, left // part.count)
    others = threading.Event()
    while not os.path.lexists(target):
        try:
            shared.prepare()
            missing = [name for name in part.in_order(plan.files) if not shared.is_done(name)]
            if missing:
                done = run_jobs(
                    [partial(shared.write, name, blocks) for name in missing],
                    total=sum(group_bytes(plan.files[name]) for name in missing),
                    what="consolidate",
                    jobs=jobs,
                    progress=progress and part.index == 0,
                )
                progress = False  # what comes is a look at what others do
                if any(done):
                    continue
            elif damaged := [name for name in earlier if not shared.is_sound(name)]:
                shared.remove(damaged)
                continue
            else:
                earlier.clear()
                written = write_models(
                    plan,
                    target,
                    blocks,
                    inputs=inputs,
                    like=like,
                    what="consolidate",
                    jobs=jobs,
                    progress=False,
                    resume=True,
                    gather=shared.gather,
                )
                shared.close()
                return replace(written, taken_over=taken_over)
        except CheckpointExistsError:  # another one is about to publish, or has
            pass
        except FileNotFoundError:
            if not os.path.lexists(target):
                raise
            break  # another one has published, and removed what this one was looking at
        others.wait(LOOK_SECONDS)
    shared.close()
    return Written(taken_over, [], Tally())


class _Shared:
    """The directory in which the files of a plan gather."""

    def __init__(self, plan: Plan, target: Path) -> None:
        self._plan = plan
        self._target = target
        self._digest = plan.digest(FORMAT)
        # Another one than that of a consolidation by one process.
        self._place = temporary(target, new_uuid(self._digest[::-1]))
        self._folder = self._place / MODEL_DIRECTORY

    def prepare(self) -> None:
        """Make the directory, if it is not there.

        Raises:
            CheckpointWriteError: it belongs to somebody else, or is a link.
        """
        durable.make_directories(self._folder)
        for path in (self._place, self._folder):
            self._check(path)

    def _check(self, path: Path, *, is_file: bool = False) -> None:
        """Refuse what another user has put there, or a link."""
        status = path.lstat()
        kind = stat.S_ISREG if is_file else stat.S_ISDIR
        if not kind(status.st_mode) or status.st_uid != os.geteuid():
            raise CheckpointWriteError(
                f"{path} is where this would be made, but it is a link or belongs to user "
                f"{status.st_uid}; nothing was touched. Look at it and remove it, or write to "
                "another path"
            )

    def is_done(self, name: str) -> bool:
        """Whether an output file is there, and durable."""
        if not os.path.lexists(self._folder / name):
            return False
        self._check(self._folder / name)
        return True

    def write(self, name: str, blocks: Blocks, advance: Callable[[int], None]) -> bool:
        """Write an output file unless somebody else does, or has; whether this process has."""
        try:
            with Workplace(self._folder / name, self._digest) as place:
                # While this process waited for the place another one may have finished.
                if os.path.lexists(self._target) or self.is_done(name):
                    return False
                if name not in place.finished:
                    (texts,) = self._plan.headers.values()
                    write_file(
                        name,
                        self._plan.files[name],
                        place,
                        {place.model: texts},
                        blocks,
                        FORMAT,
                        advance,
                    )
                line = as_line(place.finished[name])
                durable.write_durably(place.model / JOURNAL_NAME, line)
                place.publish()
        except CheckpointExistsError:
            return False
        return True

    def _finished(self, name: str) -> Finished | None:
        """What the journal says of a file that is done; ``None`` if it says nothing."""
        journal = self._folder / name / JOURNAL_NAME
        for path in (journal, self._folder / name / name):
            if os.path.lexists(path):
                self._check(path, is_file=True)
            else:
                return None
        lines = parse_journal(journal.read_bytes(), self._digest)
        return next((line for line in lines if line.file == name), None)

    def is_sound(self, name: str) -> bool:
        """Whether a file that an earlier process has finished is what it wrote."""
        line = self._finished(name)
        return line is not None and is_whole(self._folder / name / name, line)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that are not what they were."""
        for name in names:
            removal.remove(self._folder / name)

    def gather(self, place: Workplace, folder: Path) -> None:
        """Put all files into the workplace of the target; see :func:`write_models`.

        Raises:
            CheckpointExistsError: another process has published meanwhile, and removes them.
            CheckpointCorruptError: what is known of a file was removed.
        """
        try:
            for name in self._plan.files:
                self._gather(name, place, folder)
        except (CheckpointCorruptError, FileNotFoundError):
            if not os.path.lexists(self._target):
                raise
            raise CheckpointExistsError(
                f"another process has made {self._target}; nothing was written"
            ) from None

    def _gather(self, name: str, place: Workplace, folder: Path) -> None:
        line = self._finished(name)
        if line is None:
            raise CheckpointCorruptError(
                f"{self._folder / name} does not say what it holds; remove {self._place}"
            )
        if name not in place.finished:
            _link(self._folder / name / name, folder / name)
            durable.fsync(folder)
            place.record(name, line.bytes, line.digest, line.unchecked, line.overflowed)

    def close(self) -> None:
        """Remove the directory, once the target is there."""
        removal.remove(self._place)


def _link(file: Path, other: Path) -> None:
    """Another name for a file, or the only one where the file system knows no second."""
    try:
        os.link(file, other, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(file, other)
