"""Models that other software has written: a directory of Hugging Face's, or a safetensors file."""

from __future__ import annotations

from pathlib import Path

from sharded_ema.checkpoint.checked_json import load_json
from sharded_ema.checkpoint.files import Directory, OpenFiles, read_whole
from sharded_ema.checkpoint.names import is_plain_name
from sharded_ema.checkpoint.reading.chunks import Chunk, KnownChunks
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.safetensors import read_header
from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError
from sharded_ema.model.layout import Box, Shape

#: What files of weights are called, before their ending: by transformers, and by diffusers.
STEMS = ("model", "diffusion_pytorch_model")
INDEX = "{}.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
ADAPTER_WEIGHTS = f"{ADAPTER_STEM}.safetensors"
_MAX_INDEX_BYTES = 1 << 28


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
        names = weight_files(path, is_adapter)
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
    names = (*(INDEX.format(stem) for stem in STEMS), *(f"{stem}.safetensors" for stem in STEMS))
    return path.suffix == ".safetensors" or any(
        (path / name).is_file() for name in (*names, ADAPTER_WEIGHTS)
    )


def weight_files(path: Path, is_adapter: bool) -> list[str]:
    """Names of files in the directory; they may be links, as in the cache of the Hub.

    Raises:
        CheckpointCorruptError: its index is none.
    """
    for stem in STEMS:
        index = path / INDEX.format(stem)
        if index.is_file():
            files = load_json(read_whole(index, _MAX_INDEX_BYTES), str(index)).get("weight_map")
            if not isinstance(files, dict) or not all(map(is_plain_name, files.values())):
                raise CheckpointCorruptError(f"{index} is no index of safetensors files")
            return list(dict.fromkeys(files.values()))
    names = [ADAPTER_WEIGHTS] if is_adapter else [f"{stem}.safetensors" for stem in STEMS]
    return [name for name in names if (path / name).is_file()][:1]
