"""What happens beside a new checkpoint: ``latest`` names it, and old ones go."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from sharded_ema.checkpoint import commit
from sharded_ema.checkpoint.reading.catalog import LATEST_NAME, MAX_POINTER_BYTES
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME, is_plain_name
from sharded_ema.checkpoint.reading.runs import committed
from sharded_ema.errors import EMAWarning


def after_commit(path: Path, *, latest: bool, keep_last: int | None) -> None:
    """Point to the checkpoint at ``path`` and remove old ones; run by the coordinator only.

    The checkpoint is committed whatever happens here, so what fails is only warned of.
    """
    try:
        if latest:
            _point_to(path)
        if keep_last is not None:
            _keep(path, keep_last)
    except OSError as error:
        warnings.warn(
            f"{path} is committed, but what lies beside it could not be brought up to date: "
            f"{error}",
            EMAWarning,
            stacklevel=2,
        )


def _point_to(path: Path) -> None:
    pointer = path.with_name(LATEST_NAME)
    if os.path.lexists(pointer) and not _is_ours(pointer):
        return  # DeepSpeed has a file of this name, users have links
    commit.replace_durably(pointer, f"{path.name}\n".encode())


def _is_ours(pointer: Path) -> bool:
    """Whether a file called ``latest`` names a checkpoint of this library, or one that is gone."""
    if pointer.is_symlink() or not pointer.is_file():
        return False
    if pointer.stat().st_size > MAX_POINTER_BYTES:
        return False
    name = pointer.read_text(errors="replace").strip()
    target = pointer.with_name(name) if is_plain_name(name) else None
    return target is not None and (not target.exists() or (target / MANIFEST_NAME).is_file())


def _keep(path: Path, keep_last: int) -> None:
    """Remove all but the last checkpoints whose names differ from that of ``path`` in digits only.

    So a ``best`` beside ``step_100`` stays.
    """
    kind = _kind(path)
    others = [c.path for c in committed(path.parent) if _kind(c.path) == kind]
    others = [other for other in others if other.name != path.name]
    for old in others[: max(0, len(others) - (keep_last - 1))]:
        commit.remove(old)


def _kind(path: Path) -> str:
    return re.sub(r"\d+", "0", path.name)
