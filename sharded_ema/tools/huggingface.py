"""The Hugging Face model directory: what to copy from one, and its index of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Protocol

from sharded_ema.checkpoint.checked_json import load_json
from sharded_ema.checkpoint.durable import fsync, write_durably
from sharded_ema.checkpoint.files import Directory, OpenFiles, read_whole
from sharded_ema.checkpoint.names import is_plain_name
from sharded_ema.checkpoint.reading.chunks import Chunk, KnownChunks
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.safetensors import read_header
from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError
from sharded_ema.model.layout import Box, Shape

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
ADAPTER_WEIGHTS = f"{ADAPTER_STEM}.safetensors"
_MAX_INDEX_BYTES = 1 << 28
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class Named(Protocol):
    """Anything with a name and a size in bytes."""

    @property
    def name(self) -> str: ...
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
    files = _weight_files(path, is_adapter)
    shapes = {
        name: entry.shape for file in files for name, entry in read_header(path / file)[0].items()
    }
    return Model(path, shapes if files else None, is_adapter)


def open_model(path: Path, files: OpenFiles | None = None) -> Checkpoint:
    """The weights of a model directory, or of one safetensors file; no digest covers them.

    Args:
        files: see :class:`~sharded_ema.checkpoint.files.Directory`.

    Raises:
        CheckpointNotFoundError: there is neither.
        CheckpointCorruptError: an index or a header cannot be read.
    """
    if path.is_dir():
        root, is_adapter = path, (path / ADAPTER_CONFIG).is_file()
        names = _weight_files(path, is_adapter)
    else:
        root, is_adapter = path.parent, False
        names = [path.name] if path.suffix == ".safetensors" and path.is_file() else []
    if not names:
        if not path.exists():
            raise CheckpointNotFoundError(f"there is nothing at {path}")
        raise CheckpointNotFoundError(
            f"{path} holds no weights: neither safetensors files nor a DCP checkpoint"
        )
    tensors: dict[str, tuple[Shape, str]] = {}
    chunks: dict[str, list[Chunk]] = {}
    texts: dict[str, dict[str, str]] = {}
    for file in names:
        entries, texts[file], start = read_header(root / file)
        for key, entry in entries.items():
            tensors[key] = (entry.shape, entry.dtype)
            whole = Chunk(
                Box.whole(entry.shape), file, start + entry.start, entry.stop - entry.start, None
            )
            chunks[key] = [whole] if whole.num_bytes else []
    first = next((chunk.file for of_one in chunks.values() for chunk in of_one), "")
    index = KnownChunks(
        "adapter" if is_adapter else "safetensors", tensors, chunks, texts=texts.get(first, {})
    )
    return Checkpoint(Directory(root, files, links=True), index)


def holds_model(path: Path) -> bool:
    """Whether a directory has weights under the names used here, or a file is named like them."""
    names = (INDEX, "model.safetensors", ADAPTER_WEIGHTS)
    return path.suffix == ".safetensors" or any((path / name).is_file() for name in names)


def _weight_files(path: Path, is_adapter: bool) -> list[str]:
    """Names of files in the directory; they may be links, as in the cache of the Hub."""
    if not (path / INDEX).is_file():
        names = (ADAPTER_WEIGHTS,) if is_adapter else ("model.safetensors",)
        return [name for name in names if (path / name).is_file()]
    index = load_json(read_whole(path / INDEX, _MAX_INDEX_BYTES), str(path / INDEX))
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(map(is_plain_name, files.values())):
        raise CheckpointCorruptError(f"{path / INDEX} is no index of safetensors files")
    return list(dict.fromkeys(files.values()))


def copy_description(model: Model, target: Path) -> list[str]:
    """Copy configuration, tokenizer and the like; everything but weights and their index."""
    copied = []
    for source in _description(model.path):
        shutil.copyfile(source, target / source.name)
        fsync(target / source.name)
        copied.append(source.name)
    return copied


def has_description(path: Path, like: Path) -> bool:
    """Whether a directory has what :func:`copy_description` would copy there, byte for byte."""
    return all(
        (path / source.name).is_file() and cmp(source, path / source.name, shallow=False)
        for source in _description(like)
    )


def _description(path: Path) -> list[Path]:
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and file.name != INDEX and file.suffix not in _WEIGHTS
    ]


def write_index(target: Path, files: Mapping[str, Sequence[Named]]) -> None:
    """Write the index of a model, given what each of its files holds; a single file needs none."""
    if len(files) == 1:
        return
    total = sum(output.num_bytes for group in files.values() for output in group)
    weight_map = {output.name: name for name, group in files.items() for output in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    write_durably(target / INDEX, f"{text}\n".encode())
