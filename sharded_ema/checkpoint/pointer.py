"""``latest``: a file beside checkpoints that names the one committed last."""

from __future__ import annotations

from sharded_ema.checkpoint.files import is_plain_name, read_whole
from sharded_ema.checkpoint.location import Location, exists, is_file
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError

LATEST_NAME = "latest"
# Larger than any name can be.
_MAX_POINTER_BYTES = 4096


def follow(location: Location) -> Location:
    """What the file ``latest`` at ``location`` names; any other location as it is.

    Raises:
        CheckpointNotFoundError: it names nothing that could lie beside it.
    """
    if location.name != LATEST_NAME or not is_file(location):
        return location
    named = _named_by(location)
    if named is None:
        raise CheckpointNotFoundError(f"{location} names no checkpoint beside it")
    return named


def is_pointer(location: Location) -> bool:
    """Whether a file ``latest`` may be replaced: there is none, or it names one of ours.

    One that is gone counts as ours.
    """
    if not exists(location):
        return True
    target = _named_by(location) if is_file(location) else None
    return target is not None and (not exists(target) or is_file(target / MANIFEST_NAME))


def _named_by(pointer: Location) -> Location | None:
    try:
        name = read_whole(pointer, _MAX_POINTER_BYTES).decode(errors="replace").strip()
    except CheckpointCorruptError:
        return None
    return pointer.parent / name if is_plain_name(name) else None
