"""What happens beside a new checkpoint: ``latest`` names it, and old ones go."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

from sharded_ema.checkpoint.location import Location
from sharded_ema.checkpoint.pointer import LATEST_NAME, is_pointer
from sharded_ema.checkpoint.run import committed
from sharded_ema.errors import EMAWarning


def after_commit(
    location: Location,
    *,
    latest: bool,
    keep_last: int | None,
    write: Callable[[Any, bytes], object],
    remove: Callable[[Any], object],
) -> None:
    """Point to a new checkpoint and remove old ones; run by the coordinator only.

    The checkpoint is committed whatever happens here, so what fails is only warned of.

    Args:
        write: replaces a small file at once.
        remove: removes a checkpoint.
    """
    try:
        pointer = location.parent / LATEST_NAME
        # DeepSpeed has a file of this name, users have links: what is not ours stays.
        if latest and is_pointer(pointer):
            write(pointer, f"{location.name}\n".encode())
        if keep_last is not None:
            for old in _outdated(location, keep_last):
                remove(old)
    except OSError as error:
        warnings.warn(
            f"{location} is committed, but what lies beside it could not be brought up to date: "
            f"{error}",
            EMAWarning,
            stacklevel=2,
        )


def _outdated(location: Location, keep_last: int) -> list[Location]:
    """All but the last checkpoints whose names differ from that of ``location`` in digits only.

    So a ``best`` beside ``step_100`` stays.
    """
    kind = _kind(location)
    others = [c.path for c in committed(location.parent) if _kind(c.path) == kind]
    others = [other for other in others if other.name != location.name]
    return others[: max(0, len(others) - (keep_last - 1))]


def _kind(location: Location) -> str:
    return re.sub(r"\d+", "0", location.name)
