"""The checkpoints of a run: directories side by side, of which the last one counts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sharded_ema.checkpoint.reading.catalog import is_temporary
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME, parse_manifest
from sharded_ema.errors import CheckpointError, CheckpointNotFoundError


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed checkpoint.

    Attributes:
        path: its directory.
        step: the step it was saved under.
        saved_at: when it was committed, Unix time in milliseconds.
    """

    path: Path
    step: int
    saved_at: int


def committed(run: str | os.PathLike[str]) -> list[Committed]:
    """The committed checkpoints in the directory ``run`` that hold an average, oldest first.

    Only manifests are read. One that is damaged does not count.
    """
    found = []
    for path in Path(run).iterdir() if Path(run).is_dir() else ():
        manifest_path = path / MANIFEST_NAME
        if is_temporary(path) or not manifest_path.is_file():
            continue
        try:
            manifest = parse_manifest(manifest_path.read_bytes(), str(manifest_path))
        except CheckpointError:
            continue
        except FileNotFoundError:
            continue  # removed between the look and the read
        steps = [meta["step"] for meta in manifest.emas.values() if type(meta["step"]) is int]
        if steps:
            found.append(Committed(path, max(steps), manifest.saved_at))
    return sorted(found, key=lambda c: (c.saved_at, c.step))


def latest_checkpoint(run: str | os.PathLike[str]) -> Path:
    """The checkpoint in the directory ``run`` that was committed last.

    The file ``latest`` is not asked: after a crash it may name the one before.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    found = committed(run)
    if not found:
        raise CheckpointNotFoundError(f"{run} holds no committed checkpoint of an average")
    return found[-1].path
