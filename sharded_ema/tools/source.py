"""Where in a directory that a user names the checkpoint to read lies."""

from __future__ import annotations

import os
from pathlib import Path

from sharded_ema.checkpoint.location import Location, as_location, entries
from sharded_ema.checkpoint.pointer import LATEST_NAME, follow
from sharded_ema.checkpoint.reading.dcp import METADATA_NAME
from sharded_ema.checkpoint.reading.manifest import MANIFEST_NAME
from sharded_ema.checkpoint.reading.opened import Catalog, open_checkpoint
from sharded_ema.checkpoint.reading.rank_shards import open_rank_shards, rank_shards
from sharded_ema.config import ENGINE_DIRECTORY
from sharded_ema.errors import CheckpointNotFoundError

# What a directory with a committed checkpoint has.
_MARKS = {MANIFEST_NAME, METADATA_NAME}


def open_source(src: str | os.PathLike[str]) -> Catalog:
    """Open any checkpoint that can be consolidated.

    Beside those of :func:`open_checkpoint`: what ``engine.save_checkpoint`` of DeepSpeed has
    written (its directory, of which ``latest`` counts, or a tag in it), and the shards that
    ``HuggingFaceStorageWriter`` leaves without metadata, on this machine.

    Raises:
        CheckpointNotFoundError: there is none, or one of DeepSpeed without an average.
        CheckpointError: see :func:`open_checkpoint`.
    """
    where = locate(src)
    if isinstance(where, Path) and not entries(where) & _MARKS and rank_shards(where):
        return open_rank_shards(where)
    return open_checkpoint(where)


def locate(src: str | os.PathLike[str]) -> Location:
    """Where the checkpoint lies that is meant: ``src``, or the average that an engine has saved.

    Raises:
        CheckpointNotFoundError: it is a checkpoint of DeepSpeed without an average.
    """
    path = follow(as_location(src))
    names = entries(path)
    if not names or names & _MARKS:
        return path
    tag = path
    if ENGINE_DIRECTORY not in names and LATEST_NAME in names:
        tag = follow(path / LATEST_NAME)
    if entries(tag / ENGINE_DIRECTORY):
        return tag / ENGINE_DIRECTORY
    if any(name.endswith("_model_states.pt") for name in entries(tag)):
        raise CheckpointNotFoundError(
            f"{tag} is a checkpoint of DeepSpeed without an average of this library in "
            f"{tag / ENGINE_DIRECTORY}; its weights come out with DeepSpeed's zero_to_fp32.py"
        )
    return path
