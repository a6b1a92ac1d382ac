"""Shards of ``HuggingFaceStorageWriter``, which has written no metadata beside them.

Each rank's file is named ``shard-<rank>-model-<file>-of-<files>.safetensors``. Its header says
where in the global tensor a shard begins, but nothing says how large that tensor is, so a missing
last shard can only be seen by somebody who knows the shapes.
https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sharded_ema.checkpoint.checked_json import is_sizes, load_json
from sharded_ema.checkpoint.files import Directory
from sharded_ema.checkpoint.reading.chunks import Chunk, KnownChunks
from sharded_ema.checkpoint.safetensors import ITEMSIZE, read_header
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Box

FORMAT = "rank shards"
#: What none of them carries.
LACKS = (
    "shards without metadata, which carry no checksums and do not say how large whole tensors are, "
    "so that a missing last one goes unnoticed"
)
_NAME = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_SHARDING = "DCP_SHARDING_INFO"


def rank_shards(names: Iterable[str]) -> list[str]:
    """Those of the names in a directory that are of such files, in the order of their ranks."""
    return sorted(name for name in names if _NAME.fullmatch(name))


def read_rank_shards(directory: Directory, names: Iterable[str]) -> KnownChunks:
    """What the shards in a directory hold; no digest covers any of it.

    A tensor's shape is the extent of those of its shards that are there.

    Raises:
        CheckpointCorruptError: a header is malformed, or two of them contradict each other.
    """
    path = directory.location
    dtypes: dict[str, str] = {}
    chunks: dict[str, list[Chunk]] = {}
    for file in rank_shards(names):
        entries, metadata, start = read_header(directory / file)
        sharding = load_json(
            metadata.get(_SHARDING, "{}").encode(), f"{_SHARDING} of {path / file}"
        )
        for key, entry in entries.items():
            place: Any = sharding.get(key)
            offsets: Any = place.get("saved_offsets") if isinstance(place, dict) else None
            if not is_sizes(offsets) or len(offsets) != len(entry.shape):
                raise CheckpointCorruptError(f"{path / file} does not say where {key} begins")
            if dtypes.setdefault(key, entry.dtype) != entry.dtype:
                raise CheckpointCorruptError(
                    f"{key} is {dtypes[key]} in one file of {path} and {entry.dtype} in {file}"
                )
            box = Box(tuple(offsets), entry.shape)
            same = chunks.setdefault(key, [])
            if same and len(same[0].box.sizes) != len(box.sizes):
                raise CheckpointCorruptError(f"the shards of {key} in {path} differ in dimensions")
            size = entry.stop - entry.start
            same.append(Chunk(box, file, start + entry.start, size, None))
    tensors = {
        key: (tuple(map(max, zip(*map(_end, same), strict=True))), dtypes[key])
        for key, same in chunks.items()
    }
    filled = {key: [c for c in same if c.num_bytes] for key, same in chunks.items()}
    read, unread = (
        {key: found for key, found in tensors.items() if (found[1] in ITEMSIZE) is known}
        for known in (True, False)
    )
    return KnownChunks(FORMAT, read, filled, unsupported=unread)


def _end(chunk: Chunk) -> tuple[int, ...]:
    return tuple(o + n for o, n in zip(chunk.box.offsets, chunk.box.sizes, strict=True))
