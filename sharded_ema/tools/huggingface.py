"""The Hugging Face model directory: what to copy from one, and its index of files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sharded_ema.checkpoint.reading.safetensors_file import read_header
from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError
from sharded_ema.layout import Shape

_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class Sized(Protocol):
    """Anything with a size in bytes."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory to be like.

    Attributes:
        path: the directory.
        shapes: of its tensors by name in file order; ``None`` if it holds no safetensors weights.
        is_adapter: whether it is a PEFT adapter, and no whole model.
    """

    path: Path
    shapes: dict[str, Shape] | None
    is_adapter: bool = False


def read_model(path: Path) -> Model:
    """Names and shapes of a model directory, from file headers only.

    Raises:
        CheckpointNotFoundError: it does not exist, or lacks a file of its index.
        CheckpointCorruptError: its index or a header cannot be read.
    """
    if not path.is_dir():
        raise CheckpointNotFoundError(f"there is no model directory at {path}")
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    if (path / _INDEX).is_file():
        try:
            files = list(
                dict.fromkeys(json.loads((path / _INDEX).read_bytes())["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointCorruptError(f"{path / _INDEX} is no index: {error!r}") from error
    else:
        names = (ADAPTER_WEIGHTS,) if is_adapter else ("model.safetensors",)
        files = [name for name in names if (path / name).is_file()]
    shapes = {
        name: entry.shape for file in files for name, entry in read_header(path / file)[0].items()
    }
    return Model(path, shapes if files else None, is_adapter)


def copy_description(model: Model, target: Path) -> list[str]:
    """Copy configuration, tokenizer and the like; everything but weights and their index."""
    copied = []
    for source in sorted(model.path.iterdir()):
        if source.is_file() and source.name != _INDEX and source.suffix not in _WEIGHTS:
            shutil.copyfile(source, target / source.name)
            descriptor = os.open(target / source.name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            copied.append(source.name)
    return copied


def index_bytes(weight_map: dict[str, str], outputs: Sequence[Sized]) -> bytes:
    """The index of a model in several files."""
    total = sum(output.num_bytes for output in outputs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
