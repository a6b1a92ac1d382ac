"""Models that other software has written: a directory of Hugging Face's, or a file.

The files are safetensors, or of ``torch.save`` (see :mod:`.state_dicts`).
"""

from __future__ import annotations

from pathlib import Path

from sharded_ema.checkpoint.checked_json import load_json
from sharded_ema.checkpoint.files import Directory, OpenFiles, open_regular, read_whole
from sharded_ema.checkpoint.names import is_plain_name
from sharded_ema.checkpoint.reading.below import name_below
from sharded_ema.checkpoint.reading.chunks import Chunk, KnownChunks
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.reading.state_dicts import TORCH_ENDINGS, as_chunk, read_state_dict
from sharded_ema.checkpoint.safetensors import ITEMSIZE, read_header
from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError
from sharded_ema.model.layout import Box, Shape

#: What files of weights are called, before their ending: by transformers, and by diffusers.
STEMS = ("model", "diffusion_pytorch_model")
INDEX = "{}.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
ADAPTER_WEIGHTS = f"{ADAPTER_STEM}.safetensors"
#: The same by transformers, diffusers and PEFT with the files of ``torch.save``.
TORCH_WEIGHTS = "pytorch_model.bin"
_TORCH_NAMES = (TORCH_WEIGHTS, "diffusion_pytorch_model.bin")
_TORCH_ADAPTER = f"{ADAPTER_STEM}.bin"
_ENDINGS = (".safetensors", *TORCH_ENDINGS)
_MAX_INDEX_BYTES = 1 << 28


def open_model(path: Path, files: OpenFiles | None = None) -> Checkpoint:
    """The weights of a model directory, or of one file of them; no digest covers them.

    Tensors of a dtype that is not read are listed as such, whatever file they lie in.

    Args:
        files: see :class:`~sharded_ema.checkpoint.files.Directory`.

    Raises:
        CheckpointNotFoundError: there is neither.
        CheckpointCorruptError: an index or a header cannot be read.
        CheckpointMismatchError: a file of ``torch.save`` holds no state dict.
    """
    if path.is_dir():
        root, is_adapter = path, (path / ADAPTER_CONFIG).is_file()
        names = weight_files(path, is_adapter)
    else:
        root, is_adapter = path.parent, False
        names = [path.name] if path.suffix in _ENDINGS and path.is_file() else []
    if not names:
        if not path.exists():
            raise CheckpointNotFoundError(f"there is nothing at {path}")
        raise CheckpointNotFoundError(
            f"{path} holds no weights: neither files of safetensors or torch.save nor a DCP "
            f"checkpoint{name_below(path)}"
        )
    tensors: dict[str, tuple[Shape, str]] = {}
    chunks: dict[str, list[Chunk]] = {}
    texts: dict[str, str] = {}
    for file in names:
        found, said = _contents(root, file)
        texts = texts or said
        for key, (dtype, whole) in found.items():
            tensors[key] = whole.box.sizes, dtype
            chunks[key] = [whole] if whole.num_bytes else []
    is_torch = names[0].endswith(TORCH_ENDINGS)
    index = KnownChunks(
        "adapter" if is_adapter else "torch" if is_torch else "safetensors",
        {key: found for key, found in tensors.items() if found[1] in ITEMSIZE},
        chunks,
        texts,
        {key: found for key, found in tensors.items() if found[1] not in ITEMSIZE},
    )
    return Checkpoint(Directory(root, files, links=True), index)


def _contents(root: Path, file: str) -> tuple[dict[str, tuple[str, Chunk]], dict[str, str]]:
    """Dtype and place of each tensor in a file, and what the file says of them."""
    if file.endswith(TORCH_ENDINGS):
        with open_regular(root / file) as opened:
            stored = read_state_dict(opened)
        return {key: (each.dtype, as_chunk(each, file)) for key, each in stored.items()}, {}
    entries, said, start = read_header(root / file)
    found = {
        key: (e.dtype, Chunk(Box.whole(e.shape), file, start + e.start, e.stop - e.start, None))
        for key, e in entries.items()
    }
    return found, said


def holds_model(path: Path) -> bool:
    """Whether a directory has weights under the names used here, or a file is named like them."""
    if not path.is_dir():
        return path.suffix in _ENDINGS
    return any((path / name).is_file() for name in (*_index_names(), *_single_names()))


def _index_names() -> list[str]:
    """What lists the files of weights, in the order of preference."""
    return [*(INDEX.format(stem) for stem in STEMS), *(f"{n}.index.json" for n in _TORCH_NAMES)]


def _single_names() -> list[str]:
    """What a single file of weights is called, in the order of preference."""
    return [
        *(f"{stem}.safetensors" for stem in STEMS), ADAPTER_WEIGHTS, *_TORCH_NAMES, _TORCH_ADAPTER
    ]  # fmt: skip


def weight_files(path: Path, is_adapter: bool) -> list[str]:
    """Names of files in the directory; they may be links, as in the cache of the Hub.

    Raises:
        CheckpointCorruptError: its index is none.
    """
    for name in _index_names():
        index = path / name
        if index.is_file():
            files = load_json(read_whole(index, _MAX_INDEX_BYTES), str(index)).get("weight_map")
            if not isinstance(files, dict) or not all(map(is_plain_name, files.values())):
                raise CheckpointCorruptError(f"{index} is no index of files of weights")
            return list(dict.fromkeys(files.values()))
    names = [n for n in _single_names() if n.startswith(ADAPTER_STEM) == is_adapter]
    return [name for name in names if (path / name).is_file()][:1]
