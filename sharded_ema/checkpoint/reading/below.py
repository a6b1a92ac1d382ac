"""What lies below a directory that is no checkpoint, for those who have named it instead of one.

Trainings put what they save into directories of their own: transformers into ``checkpoint-500``,
accelerate with FSDP its weights into ``pytorch_model_fsdp_0`` below that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sharded_ema.checkpoint.files import Location, entries
from sharded_ema.checkpoint.names import COMMITTED_NAMES, MANIFEST_NAME, is_marked, is_stray
from sharded_ema.checkpoint.reading.rank_shards import rank_shards

# As RUN/checkpoints/checkpoint_3/pytorch_model_fsdp_0.
_MAX_DEPTH = 3
# Under a URL each look is a request, and on a large file system it takes its time as well.
_MAX_LOOKS = 1000
_EXPORT = 2  # how likely one is meant, see below
_WEIGHTS = re.compile(r".*\.safetensors|(diffusion_)?pytorch_model(-\d+-of-\d+)?\.bin")


def name_below(root: Location) -> str:
    """The end of a sentence that says what lies below ``root``; empty if nothing does."""
    found = sorted(_below(root))
    if not found:
        return ""
    # Beside checkpoints, exports are not what was meant.
    alike = sum((rank == _EXPORT) == (found[-1][0] == _EXPORT) for rank, _, _ in found)
    count = f"{alike} directories in it do" if alike > 1 else "a directory in it does"
    return f"; but {count}, such as {found[-1][-1]}"


def _below(root: Location) -> Iterator[tuple[int, list[tuple[bool, int, str]], str]]:
    """What can be read below ``root``, by what it is: how likely it is meant, order, name."""
    depth = _MAX_DEPTH if isinstance(root, Path) else 1
    folders, looks = [""], 0
    for _ in range(depth):
        inner = []
        for folder in folders:
            for name in sorted(entries(root / folder if folder else root)):
                if is_marked(name) or is_stray(name) or looks == _MAX_LOOKS:
                    continue
                looks += 1
                path = f"{folder}/{name}".lstrip("/")
                rank = _rank(name, entries(root / path))
                if rank:
                    yield rank, _in_order(path), path
                else:
                    inner.append(path)
        folders = inner


def _rank(name: str, names: set[str]) -> int:
    """How likely a directory with these names in it is meant; 0 if it is nothing to read."""
    if MANIFEST_NAME in names:
        return 4
    if names & COMMITTED_NAMES:
        return 1 if name.startswith("optimizer") else 3
    return _EXPORT if rank_shards(names) or any(map(_WEIGHTS.fullmatch, names)) else 0


def _in_order(path: str) -> list[tuple[bool, int, str]]:
    """A key that sorts the numbers in names by their values."""
    parts = re.split(r"(\d+)", path)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
