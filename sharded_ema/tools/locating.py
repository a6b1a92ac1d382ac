"""Where in a directory that a user names the checkpoint to read lies."""

from __future__ import annotations

import os
from pathlib import Path

from sharded_ema.checkpoint.reading.catalog import Catalog, open_checkpoint
from sharded_ema.checkpoint.reading.dcp import METADATA_NAME
from sharded_ema.checkpoint.reading.locations import URL, as_location
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.checkpoint.reading.pointer import LATEST_NAME, follow
from sharded_ema.checkpoint.reading.rank_shards import open_rank_shards, rank_shards
from sharded_ema.config import ENGINE_DIRECTORY
from sharded_ema.errors import CheckpointNotFoundError


def open_source(src: str | os.PathLike[str]) -> Catalog:
    """Open any checkpoint that can be consolidated.

    Beside those of :func:`open_checkpoint`: what ``engine.save_checkpoint`` of DeepSpeed has
    written (its directory, of which ``latest`` counts, or a tag in it), and the shards that
    ``HuggingFaceStorageWriter`` leaves without metadata.

    Raises:
        CheckpointNotFoundError: there is none, or one of DeepSpeed without an average.
        CheckpointError: see :func:`open_checkpoint`.
    """
    path = follow(as_location(src))
    if isinstance(path, URL):
        return open_checkpoint(path)
    if not path.is_dir() or (path / MANIFEST_NAME).exists() or (path / METADATA_NAME).exists():
        return open_checkpoint(src)
    if rank_shards(path):
        return open_rank_shards(path)
    tag = path
    if (path / LATEST_NAME).is_file():
        tag = Path(follow(path / LATEST_NAME))
    if (tag / ENGINE_DIRECTORY).is_dir():
        return open_checkpoint(tag / ENGINE_DIRECTORY)
    if any(tag.glob("*_model_states.pt")):
        raise CheckpointNotFoundError(
            f"{tag} is a checkpoint of DeepSpeed without an average of this library in "
            f"{tag / ENGINE_DIRECTORY}; its weights come out with DeepSpeed's zero_to_fp32.py"
        )
    return open_checkpoint(src)
