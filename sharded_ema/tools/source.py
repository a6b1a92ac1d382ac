"""Opening whatever a user names as a source.

A further format is an :class:`~sharded_ema.checkpoint.reading.chunks.Index` and a branch here.
"""

from __future__ import annotations

import os
from pathlib import Path

from sharded_ema.checkpoint.files import URL, Directory, Location, OpenFiles, as_location, entries
from sharded_ema.checkpoint.names import COMMITTED_NAMES
from sharded_ema.checkpoint.reading.models import open_model
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.reading.rank_shards import rank_shards, read_rank_shards
from sharded_ema.checkpoint.run import locate, open_checkpoint
from sharded_ema.errors import CheckpointNotFoundError


def open_source(src: str | os.PathLike[str], files: OpenFiles | None = None) -> Checkpoint:
    """Open any checkpoint that can be consolidated.

    Beside those of :func:`~sharded_ema.checkpoint.run.open_checkpoint`: what
    ``engine.save_checkpoint`` of DeepSpeed has written (its directory, of which ``latest`` counts,
    or a tag in it), and the shards that ``HuggingFaceStorageWriter`` leaves without metadata, on
    this machine.

    Args:
        files: see :class:`~sharded_ema.checkpoint.files.Directory`.

    Raises:
        CheckpointNotFoundError: there is none, or one of DeepSpeed without an average.
        CheckpointError: see :func:`~sharded_ema.checkpoint.run.open_checkpoint`.
    """
    where = locate(src)
    return open_rank_shards(where, files) or open_checkpoint(where, files)


def open_rank_shards(where: Location, files: OpenFiles | None = None) -> Checkpoint | None:
    """The shards of ``HuggingFaceStorageWriter`` in a directory; ``None`` if it holds none.

    Raises:
        CheckpointCorruptError: see :func:`~sharded_ema.checkpoint.reading.rank_shards`.
    """
    names = entries(where) if isinstance(where, Path) else set()
    if not rank_shards(names) or names & COMMITTED_NAMES:
        return None
    directory = Directory(where, files)
    return Checkpoint(directory, read_rank_shards(directory, names))


def open_weights(path: str | os.PathLike[str], files: OpenFiles | None = None) -> Checkpoint:
    """The same, and on this machine also a Hugging Face directory or a file of weights.

    Raises:
        CheckpointNotFoundError: none of these is there.
        CheckpointCorruptError: it cannot be read.
    """
    try:
        return open_source(path, files)
    except CheckpointNotFoundError:
        where = as_location(path)
        if isinstance(where, URL):
            raise
        return open_model(where, files)
