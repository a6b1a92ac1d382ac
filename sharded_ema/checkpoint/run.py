"""Where checkpoints are found: the one that a path means, and those of a run.

One grammar for all that look for checkpoints. Those of a run lie in its directory side by side
(``RUN/step_100``), or each in the directory of a step that holds more (``RUN/step_100/ema``, as
DeepSpeed engines save), or either below ``RUN/checkpoints``. A file ``latest`` beside them names
one. What bears the mark of a save that has not finished, or of a replacement, is none of them.
Links are followed, as to a larger disk; what is in the run under its own name as well comes once,
under that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sharded_ema.checkpoint.files import (
    URL,
    Directory,
    Location,
    OpenFiles,
    as_location,
    entries,
    exists,
    gone,
    identity,
    is_file,
    read_if_file,
)
from sharded_ema.checkpoint.names import (
    CHECKPOINTS_DIRECTORY,
    COMMITTED_NAMES,
    ENGINE_DIRECTORY,
    LATEST_NAME,
    MANIFEST_NAME,
    METADATA_NAME,
    TEMPORARY_MARK,
    is_marked,
    is_part,
    is_plain_name,
    is_set_aside,
    looks_temporary,
    without_mark,
)
from sharded_ema.checkpoint.reading.below import name_below
from sharded_ema.checkpoint.reading.manifest import read_manifest
from sharded_ema.checkpoint.reading.opened import Checkpoint, open_directory
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointGoneError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
)

# Larger than any name can be.
_MAX_POINTER_BYTES = 4096
# How often a checkpoint that is replaced while it is opened is opened again.
_MAX_LOOKS = 20
# Checkpoints whose manifests need not be read again.
_MAX_REMEMBERED = 10_000

# ---------------------------------------------------------------------- the one that a path means


def open_checkpoint(
    path: str | os.PathLike[str], files: OpenFiles | None = None, *, check_files: bool = True
) -> Checkpoint:
    """Open a committed checkpoint of this library, or one of torch.distributed.checkpoint.

    Args:
        path: see :func:`find_checkpoint`.
        files: see :class:`~sharded_ema.checkpoint.files.Directory`.
        check_files: see :func:`~sharded_ema.checkpoint.reading.opened.open_directory`.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointUncommittedError: a save that did not finish.
        CheckpointCorruptError: damaged, incomplete, or with files that do not belong to it.
        CheckpointMismatchError: written by a later version of this library.
    """
    found: CheckpointGoneError | None = None
    for _ in range(_MAX_LOOKS):
        try:
            directory, names = find_checkpoint(path, files)
            with directory.unless_gone():
                return open_directory(directory, names, check_files=check_files)
        except CheckpointGoneError as error:
            found = error
        except CheckpointUncommittedError:
            if found is None:
                raise
            break  # under a URL the manifest is removed first, and what is left is no save
    assert found is not None
    raise found


def find_checkpoint(
    path: str | os.PathLike[str], files: OpenFiles | None = None
) -> tuple[Directory, set[str]]:
    """The directory that holds a committed checkpoint, held open, and the names in it.

    It is ``path`` itself, or what a file ``latest`` at ``path`` names, or what an interrupted
    replacement of ``path`` has set aside.

    Args:
        files: see :class:`~sharded_ema.checkpoint.files.Directory`.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointUncommittedError: a save that did not finish.
    """
    for _ in range(_MAX_LOOKS - 1):
        with suppress(CheckpointGoneError):
            return _find(path, files)
    return _find(path, files)


def _find(path: str | os.PathLike[str], files: OpenFiles | None) -> tuple[Directory, set[str]]:
    where = follow(as_location(path))
    if isinstance(where, Path) and not where.is_dir():
        where = _interrupted_replacement(where)
    if looks_temporary(where.name):
        raise CheckpointUncommittedError(
            f"{where} is the temporary directory of a save that did not finish; use an earlier "
            "checkpoint"
        )
    try:
        directory = Directory(where, files)
    except CheckpointNotFoundError:
        raise gone(where) from None
    names = directory.names()
    if names & COMMITTED_NAMES:
        return directory, names
    if directory.is_gone():
        raise gone(where)
    if any(map(is_part, names)):
        raise CheckpointUncommittedError(
            f"{where} has parts of a checkpoint and no {MANIFEST_NAME}: the save did not finish, "
            "it is being removed, or the manifest was not copied; use another checkpoint"
        )
    raise CheckpointNotFoundError(
        f"{where} holds no checkpoint: no {MANIFEST_NAME}, no {METADATA_NAME}{name_below(where)}"
    )


def locate(path: str | os.PathLike[str]) -> Location:
    """Where the checkpoint lies that is meant: ``path``, or the average that an engine has saved.

    Of the directory that DeepSpeed saves to, the tag counts that its ``latest`` names.

    Raises:
        CheckpointNotFoundError: it is a checkpoint of DeepSpeed without an average.
    """
    where = follow(as_location(path))
    names = entries(where)
    if not names or names & COMMITTED_NAMES:
        return where
    tag = where
    if ENGINE_DIRECTORY not in names and LATEST_NAME in names:
        tag = follow(where / LATEST_NAME)
    if entries(tag / ENGINE_DIRECTORY):
        return tag / ENGINE_DIRECTORY
    if any(name.endswith("_model_states.pt") for name in entries(tag)):
        raise CheckpointNotFoundError(
            f"{tag} is a checkpoint of DeepSpeed without an average of this library in "
            f"{tag / ENGINE_DIRECTORY}; its weights come out with DeepSpeed's zero_to_fp32.py"
        )
    return where


def follow(location: Location) -> Location:
    """What the file ``latest`` at ``location`` names; any other location as it is.

    Raises:
        CheckpointNotFoundError: it names nothing that could lie beside it.
    """
    name = _named_by(location) if location.name == LATEST_NAME else None
    if name is None:
        return location
    if not is_plain_name(name):
        raise CheckpointNotFoundError(f"{location} names no checkpoint beside it")
    return location.parent / name


def is_pointer(location: Location) -> bool:
    """Whether a file ``latest`` may be replaced: there is none, or it names one of ours.

    One that is gone counts as ours.
    """
    if not exists(location):
        return True
    name = _named_by(location)
    if not is_plain_name(name):
        return False
    target = location.parent / str(name)
    return not exists(target) or is_file(target / MANIFEST_NAME)


def _named_by(pointer: Location) -> str | None:
    """What a file ``latest`` says, which need not be a name; ``None`` if it is no file."""
    try:
        data = read_if_file(pointer, _MAX_POINTER_BYTES)
    except CheckpointCorruptError:
        return ""
    return None if data is None else data.decode(errors="replace").strip()


def find_set_aside(path: Path) -> Path | None:
    """The checkpoint that an interrupted save with ``replace=True`` has left beside ``path``.

    Only names with the uuid of a save count: what a user calls ``<name>.old-1`` is his own.
    """
    found = [
        sibling
        for sibling in _siblings(path)
        if is_set_aside(sibling.name)
        and without_mark(sibling.name) == path.name
        and not sibling.is_symlink()
        and (sibling / MANIFEST_NAME).is_file()
    ]
    return max(found, key=_modified) if found else None


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # removed just now
        return 0


def _interrupted_replacement(path: Path) -> Path:
    """The checkpoint set aside for one at ``path`` that never came."""
    aside = None if os.path.lexists(path) else find_set_aside(path)
    if aside is None and path.is_dir():  # the replacement has come in this moment
        raise gone(path)
    if aside is None:
        unfinished = [
            p.name for p in _siblings(path) if p.name.startswith(path.name + TEMPORARY_MARK)
        ]
        raise CheckpointNotFoundError(
            f"{path} is not a directory with a checkpoint"
            + (f"; {unfinished[0]} beside it is a save that did not finish" if unfinished else "")
        )
    return aside


def _siblings(path: Path) -> Iterator[Path]:
    return path.parent.iterdir() if path.parent.is_dir() else iter(())


# ---------------------------------------------------------------------- committed ones


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed checkpoint.

    Attributes:
        path: its directory or URL.
        step: the step it was saved under.
        saved_at: when it was committed, Unix time in milliseconds.
        uuid: of the save.
        num_bytes: size of its files, without the manifest.
        run: what tells its average from others, and is kept through loads; ``""`` if unknown, as
            of checkpoints by earlier versions.
    """

    path: Location
    step: int
    saved_at: int
    uuid: str
    num_bytes: int
    run: str = ""

    @property
    def name(self) -> str:
        """What to call it: the name of its step."""
        return checkpoint_name(self.path)

    @property
    def order(self) -> tuple[int, int]:
        """What the checkpoints of a run are sorted by: after going back, steps fall.

        No save has an earlier time than what lies beside it, whatever the clock says.
        """
        return self.saved_at, self.step


def checkpoint_name(path: Location) -> str:
    """What to call a checkpoint of a run: the name of its step."""
    return path.parent.name if path.name == ENGINE_DIRECTORY else path.name


def committed_at(path: Location) -> Committed | None:
    """The committed checkpoint at ``path``; ``None`` if there is none, or no average in it.

    Only its manifest is read, and that only once for as long as nobody writes another.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    known = identity(path / MANIFEST_NAME)
    if known is None:
        return _read_committed(path)
    remembered = _remembered(path, known)
    if not remembered:
        found = _read_committed(path)
        if identity(path / MANIFEST_NAME) != known:  # replaced meanwhile
            return found
        remembered.append(found)
    return remembered[0]


@lru_cache(maxsize=_MAX_REMEMBERED)
def _remembered(path: Location, known: tuple[object, ...]) -> list[Committed | None]:
    """What was found at ``path`` when its manifest had this identity, to be filled in."""
    return []


def _read_committed(path: Location) -> Committed | None:
    if not is_file(path / MANIFEST_NAME):
        return None
    try:
        manifest = read_manifest(Directory(path))
    except CheckpointError:
        if is_file(path / MANIFEST_NAME):
            raise
        return None  # removed between the look and the read
    steps = [meta["step"] for meta in manifest.emas.values() if type(meta.get("step")) is int]
    if not steps:
        return None
    num_bytes = sum(file.num_bytes for file in manifest.files)
    runs = {meta.get("run") for meta in manifest.emas.values()}
    run = ",".join(sorted(r for r in runs if isinstance(r, str)))
    return Committed(path, max(steps), manifest.saved_at, manifest.uuid, num_bytes, run)


# Of so many manifests beside a new checkpoint, those changed last, the time is looked at.
_MAX_NEIGHBOURS = 4


def saved_last_beside(path: Location) -> int:
    """The latest time at which a checkpoint beside ``path`` says that it was saved, or 0.

    Each is later than those before it. So on a file system the manifests that were changed last,
    by its own clock, will do; and under a URL, where each look is a request, what ``latest`` names.
    """
    found = [0]
    for neighbour in _neighbours(path):
        with suppress(CheckpointError, OSError):
            at = committed_at(neighbour)
            found += [at.saved_at] if at else []
    return max(found)


def _neighbours(path: Location) -> list[Location]:
    if isinstance(path, URL):
        name = named_by_latest(path.parent)
        return [path.parent / name] if name else []
    changed = []
    for name in entries(path.parent):
        with suppress(OSError):
            if not looks_temporary(name):
                changed.append(((path.parent / name / MANIFEST_NAME).stat().st_mtime_ns, name))
    return [path.parent / name for _, name in sorted(changed)[-_MAX_NEIGHBOURS:]]


def named_by_latest(folder: Location) -> str | None:
    """The name that the file ``latest`` in a directory holds; ``None`` without such a file."""
    pointer = folder / LATEST_NAME
    try:
        named = follow(pointer)
    except (CheckpointError, OSError):
        return None
    return named.name if named != pointer else None


def committed(run: str | os.PathLike[str]) -> list[Committed]:
    """The committed checkpoints side by side in the directory ``run`` that hold an average.

    Oldest first. Only manifests are read. One that is damaged does not count.
    """
    root, found = as_location(run), []
    for path in _once(root, _beside(root)):
        with suppress(CheckpointError):
            at = None if is_marked(path.name) else committed_at(path)
            found += [at] if at else []
    return sorted(found, key=lambda checkpoint: checkpoint.order)


def latest_checkpoint(run: str | os.PathLike[str]) -> Location:
    """The checkpoint in the directory of a run that was committed last.

    Those of training stacks are found where they put them: ``checkpoint-N/ema`` of transformers,
    ``checkpoints/checkpoint_N/ema`` of accelerate, ``<tag>/ema`` of DeepSpeed, and in a
    directory ``checkpoints``, as Lightning has it. The file ``latest`` is not asked: after a crash
    it may name the one before.

    Args:
        run: a directory, or a URL.

    Returns:
        A path, or for a URL a URL.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    found = read_run(run).checkpoints
    if not found:
        raise CheckpointNotFoundError(f"{run} holds no committed checkpoint of an average")
    return found[-1].path


# ---------------------------------------------------------------------- those of a run


@dataclass(frozen=True, slots=True)
class Run:
    """What lies in the directory of a run.

    Attributes:
        checkpoints: the committed ones that hold an average, oldest first.
        damaged: what is wrong with a manifest, by the name of its checkpoint.
        leftovers: paths below the run of saves that did not finish, or are under way.
        latest: the name that the file ``latest`` holds; ``None`` without such a file.
    """

    checkpoints: list[Committed]
    damaged: dict[str, str]
    leftovers: list[str]
    latest: str | None


def read_run(run: str | os.PathLike[str]) -> Run:
    """Look at the manifests in a run."""
    root = as_location(run)
    latest = named_by_latest(root) or named_by_latest(root / CHECKPOINTS_DIRECTORY)
    found = Run([], {}, [], latest)
    for path in _places(root):
        if _is_unfinished(path):
            found.leftovers.append(str(path).removeprefix(f"{root}/"))
            continue
        try:
            checkpoint = committed_at(path)
        except CheckpointError as error:
            found.damaged[checkpoint_name(path)] = str(error)
            continue
        if checkpoint is not None:
            found.checkpoints.append(checkpoint)
    found.checkpoints.sort(key=lambda checkpoint: checkpoint.order)
    return found


def checkpoints_of(run: Location) -> Iterator[Location]:
    """Where committed checkpoints of a run lie, DCP's among them, or the one at ``run`` itself."""
    for path in (run, *_places(run)):
        if _names(path) & COMMITTED_NAMES and (path == run or not is_marked(path.name)):
            yield path


def _places(run: Location) -> list[Location]:
    """Where checkpoints of a run may lie, and what saves have left there; each place once."""
    found: list[Location] = []
    for folder in (run, run / CHECKPOINTS_DIRECTORY):
        for path in _beside(folder):
            found.append(path)
            if not is_marked(path.name) and path.name != CHECKPOINTS_DIRECTORY:
                found += [path / inner for inner in sorted(filter(_is_engines, _names(path)))]
    return _once(run, found)


def _beside(folder: Location) -> list[Location]:
    """What may be a checkpoint among the entries of a directory."""
    paths = [folder / name for name in sorted(_names(folder))]
    return [path for path in paths if isinstance(path, URL) or path.is_dir()]


def _once(root: Location, paths: Sequence[Location]) -> list[Location]:
    """Each place below ``root`` once: what has a name there and a link to it, by that name."""
    if isinstance(root, URL):
        return list(paths)
    real = {path: path.resolve() for path in paths if isinstance(path, Path)}
    own = [path for path in real if real[path] == root.resolve() / path.relative_to(root)]
    found: dict[Path, Location] = {}
    for path in (*own, *real):
        found.setdefault(real[path], path)
    return list(found.values())


def _is_engines(name: str) -> bool:
    return name == ENGINE_DIRECTORY or (is_marked(name) and name.startswith(f"{ENGINE_DIRECTORY}."))


def _names(folder: Location) -> set[str]:
    try:
        return entries(folder)
    except FileNotFoundError:  # removed just now
        return set()


def _is_unfinished(path: Location) -> bool:
    """Whether a directory belongs to a save that has not finished, or was replaced by one."""
    if is_marked(path.name):
        return True
    names = _names(path)
    return not names & COMMITTED_NAMES and any(map(is_part, names))
