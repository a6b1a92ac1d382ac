"""A consolidated model in the files of PyTorch, made from its safetensors files.

The tensors are views of mapped files, so the model is never held in memory of its own: what the
process is charged for is the page cache, which the system takes back as it needs it.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from sharded_ema.checkpoint.dtypes import TORCH_DTYPE
from sharded_ema.checkpoint.durable import fsync
from sharded_ema.checkpoint.names import temporary
from sharded_ema.checkpoint.safetensors import read_header


def map_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, read when they are looked at; not to be written to."""
    found: dict[str, Tensor] = {}
    for path in paths:
        entries, _, start = read_header(path)
        with open(path, "rb") as file:
            # Private, so that torch may take it for writable and the file is still safe.
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, entry in entries.items():
            dtype, numel = TORCH_DTYPE[entry.dtype], 1
            for extent in entry.shape:
                numel *= extent
            flat = (
                torch.frombuffer(view, dtype=dtype, count=numel, offset=start + entry.start)
                if numel
                else torch.empty(0, dtype=dtype, device="cpu")
            )
            found[name] = flat.view(entry.shape)
    return found


def write_torch(sources: Sequence[Path], target: Path, shared: Mapping[str, str]) -> None:
    """Write a dict of all tensors with ``torch.save``, for ``torch.load(weights_only=True)``.

    Args:
        shared: further names of tensors, with those that they have in the sources; they share
            their memory, in the file and when it is loaded.
    """
    tensors = map_tensors(sources)
    tensors |= {alias: tensors[name] for alias, name in shared.items()}
    new = temporary(target)
    torch.save(tensors, new)
    fsync(new)
    os.rename(new, target)


def write_dcp(sources: Sequence[Path], folder: Path) -> None:
    """Write all tensors as a checkpoint that ``torch.distributed.checkpoint.load`` takes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(map_tensors(sources), checkpoint_id=folder, no_dist=True)
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)
