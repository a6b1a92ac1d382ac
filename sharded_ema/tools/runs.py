"""The directory of a run as the tools see it: its checkpoints, and what is none or no longer one.

Checkpoints lie in it side by side (``RUN/step_100``), or each in the directory of a step that holds
more (``RUN/step_100/ema``, as DeepSpeed engines save), or either below ``RUN/checkpoints``, as the
training program has it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sharded_ema.checkpoint.location import Location, as_location, entries
from sharded_ema.checkpoint.pointer import LATEST_NAME, follow
from sharded_ema.checkpoint.reading.dcp import METADATA_NAME
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.checkpoint.reading.opened import is_part, is_temporary
from sharded_ema.checkpoint.run import Committed, committed_at, in_order
from sharded_ema.config import ENGINE_DIRECTORY
from sharded_ema.errors import CheckpointError

_SET_ASIDE = re.compile(r"\.old-[0-9a-f]{32}$")
_CHECKPOINTS = "checkpoints"


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


def checkpoint_name(path: Location) -> str:
    """What to call a checkpoint of a run: the name of its step."""
    return path.parent.name if path.name == ENGINE_DIRECTORY else path.name


def read_run(run: str | os.PathLike[str]) -> Run:
    """Look at the manifests in a run; links are not followed."""
    root = as_location(run)
    found = Run([], {}, [], _latest(root) or _latest(root / _CHECKPOINTS))
    for path in _candidates(root):
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
    found.checkpoints.sort(key=in_order)
    return found


def _candidates(root: Location) -> Iterator[Location]:
    for folder in (root, root / _CHECKPOINTS):
        for name in sorted(_names(folder)):
            path = folder / name
            if isinstance(path, Path) and (path.is_symlink() or not path.is_dir()):
                continue
            yield path
            if not _is_marked(name) and name != _CHECKPOINTS:
                inner = sorted(n for n in _names(path) if n.partition(".")[0] == ENGINE_DIRECTORY)
                yield from (path / n for n in inner)


def _names(folder: Location) -> set[str]:
    try:
        return entries(folder)
    except FileNotFoundError:  # removed just now
        return set()


def _is_marked(name: str) -> bool:
    return is_temporary(name) or bool(_SET_ASIDE.search(name))


def _is_unfinished(path: Location) -> bool:
    """Whether a directory belongs to a save that has not finished, or was replaced by one."""
    if _is_marked(path.name):
        return True
    names = _names(path)
    return not names & {MANIFEST_NAME, METADATA_NAME} and any(map(is_part, names))


def _latest(folder: Location) -> str | None:
    pointer = folder / LATEST_NAME
    try:
        named = follow(pointer)
    except CheckpointError:
        return None
    return named.name if named != pointer else None
