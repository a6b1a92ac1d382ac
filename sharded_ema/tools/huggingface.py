"""The Hugging Face model directory: what it holds, what to copy from one, and its index of files.

One of diffusers' pipelines is a directory of such directories, of which an average is one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from sharded_ema.checkpoint.checked_json import load_json
from sharded_ema.checkpoint.durable import fsync, new_small_file, write_durably
from sharded_ema.checkpoint.files import as_path, lies_in, read_whole
from sharded_ema.checkpoint.names import is_plain_name
from sharded_ema.checkpoint.reading.models import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    INDEX,
    STEMS,
    holds_model,
    open_model,
    weight_files,
)
from sharded_ema.checkpoint.safetensors import read_header
from sharded_ema.errors import CheckpointNotFoundError
from sharded_ema.model.layout import Shape

# What a model directory needs beside its weights, as shell patterns in lower case: configuration,
# tokenizer, processor, chat template, licence, model card.
_DESCRIPTION = (
    "config.json", "generation_config.json", "adapter_config.json", "model_index.json",
    "scheduler_config.json", "quantize_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece*.model", "source.spm", "target.spm", "*.tiktoken", "tekken.json",
    "bpe.codes",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json",
    "chat_template.json", "chat_template.jinja",
    "license", "license.*", "licence", "licence.*", "notice", "notice.*", "use_policy.md",
    "readme.md",
)  # fmt: skip
_CODE = "*.py"
CONFIG = "config.json"
_PIPELINE = "model_index.json"
_MAX_CONFIG_BYTES = 1 << 24
_WEIGHTS = ".safetensors"
# Of components of a pipeline that have no safetensors files.
_TORCH_INDEXES = ("pytorch_model.bin.index.json", "diffusion_pytorch_model.bin.index.json")
# In config.json and the configurations of parts in it. That of a quantisation has other names.
_DTYPE_FIELD = re.compile(
    r'("(?:torch_)?dtype"\s*:\s*)"(?:torch\.)?(?:float64|float32|bfloat16|float16)"'
)
_NUMBER_OF_FILE = re.compile(r"-\d+-of-\d+")


class Named(Protocol):
    """Anything with a name and a size in bytes."""

    @property
    def name(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be like.

    Attributes:
        path: its directory, or the file of its weights, which describes nothing but these.
        tensors: shape and safetensors dtype of its tensors by name in file order; ``None`` if it
            holds no weights.
        stem: what its files of weights are called, before their numbers and ending.
        is_adapter: whether it is a PEFT adapter, and no whole model.
        trust_code: whether Python files belong to its description.
        pipeline: directory of the pipeline that it is a component of, if that is to be whole.
    """

    path: Path
    tensors: dict[str, tuple[Shape, str]] | None
    stem: str = STEMS[0]
    is_adapter: bool = False
    trust_code: bool = False
    pipeline: Path | None = None

    @property
    def shapes(self) -> dict[str, Shape] | None:
        """Of its tensors by name, if it has any."""
        if self.tensors is None:
            return None
        return {name: shape for name, (shape, _) in self.tensors.items()}

    @property
    def folder(self) -> str:
        """Where it goes in an output; empty for the output itself."""
        return "" if self.pipeline is None else self.path.name


def read_like(
    like: str | os.PathLike[str] | None, shapes: Mapping[str, Shape], *, trust_code: bool
) -> Model | None:
    """The model that an output is to be like, if it is to be like any.

    Args:
        shapes: of the tensors to write, by which the component of a pipeline is found.

    Raises:
        ConfigError, CheckpointError: see :func:`as_path` and :func:`read_model`.
    """
    if like is None:
        return None
    path = as_path(like, "like")
    # Nobody trains a component that lies in a pickle beside others that do not.
    found = {folder: _weights(folder) for folder in _members(path)}
    components = [folder for folder, files in found.items() if files]
    components = [f for f in components if found[f][0].endswith(_WEIGHTS)] or components
    if not components or _weights(path):
        return read_model(path, trust_code=trust_code)
    models = [read_model(folder, trust_code=trust_code, pipeline=path) for folder in components]
    return max(models, key=lambda model: _in_common(model, shapes))


def _in_common(model: Model, shapes: Mapping[str, Shape]) -> int:
    return sum(shapes.get(name) == shape for name, shape in (model.shapes or {}).items())


def read_model(path: Path, *, trust_code: bool = False, pipeline: Path | None = None) -> Model:
    """Names, shapes and dtypes of a model directory, or of a file of weights, from headers only.

    Args:
        trust_code, pipeline: see :class:`Model`.

    Raises:
        CheckpointNotFoundError: it does not exist, or lacks a file of its index.
        CheckpointCorruptError: its index or a header cannot be read.
    """
    if not path.is_dir() and not (path.is_file() and holds_model(path)):
        raise CheckpointNotFoundError(f"there is no model directory at {path}")
    files = _weights(path)
    tensors: dict[str, tuple[Shape, str]] = {}
    if holds_model(path):
        with open_model(path) as model:
            named = model.tensors | model.unread
            tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in named.items()}
    else:
        for file in files:
            entries, _, _ = read_header(path / file)
            tensors |= {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
    return Model(
        path,
        tensors if files else None,
        _stem(path, files),
        (path / ADAPTER_CONFIG).is_file(),
        trust_code,
        pipeline,
    )


def read_config(model: Path) -> dict[str, Any]:
    """Its ``config.json``; empty if there is none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((model / CONFIG).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _weights(path: Path) -> list[str]:
    """Names of its files of weights: those that loaders look for, or whatever it has."""
    if not path.is_dir():
        return [path.name] if path.is_file() else []
    files = weight_files(path, (path / ADAPTER_CONFIG).is_file())
    if files:
        return files
    for index in sorted(path.glob("*.safetensors.index*.json")):  # of a variant, such as fp16
        listed = load_json(read_whole(index, _MAX_CONFIG_BYTES), str(index)).get("weight_map")
        if isinstance(listed, dict) and listed and all(map(is_plain_name, listed.values())):
            return list(dict.fromkeys(listed.values()))
    return sorted(file.name for file in path.glob(f"*{_WEIGHTS}"))


def _stem(path: Path, files: Sequence[str]) -> str:
    """What the files of an output are called: as those of the model, but for its variant."""
    stems = {_NUMBER_OF_FILE.sub("", file).rpartition(".")[0] for file in files}
    for stem in (*STEMS, ADAPTER_STEM):
        if any(found == stem or found.startswith(f"{stem}.") for found in stems):
            return stem
    if len(stems) == 1 and path.is_dir() and files[0].endswith(_WEIGHTS):
        return stems.pop()
    return STEMS[1] if "_diffusers_version" in read_config(path) else STEMS[0]


# ---------------------------------------------------------------------- what is copied


def copy_description(model: Model, target: Path, dtype: str | None) -> list[str]:
    """Copy configuration, tokenizer and the like; what else lies there stays where it is.

    Args:
        dtype: what ``config.json`` is to say, as PyTorch calls it; ``None`` for what it says.
    """
    copied = []
    for source in _description(model.path, trust_code=model.trust_code):
        if source.name == CONFIG and dtype is not None:
            text = _with_dtype(read_whole(source, _MAX_CONFIG_BYTES), dtype)
            write_durably(target / source.name, text)
        else:
            _copy(source, target / source.name)
        copied.append(source.name)
    return copied


def copy_pipeline(model: Model, target: Path) -> list[str]:
    """Copy what a pipeline has beside one of its models: the other components, weights included.

    Returns:
        Names of what was copied, none if the model is not to be part of a pipeline.
    """
    if model.pipeline is None:
        return []
    copied = []
    for folder in (model.pipeline, *_members(model.pipeline)):
        if folder.name == model.path.name:
            continue
        files = _description(folder, trust_code=model.trust_code)
        if folder != model.pipeline:
            files += _copied_weights(folder)
        place = target / folder.relative_to(model.pipeline)
        place.mkdir(exist_ok=True)
        for source in files:
            _copy(source, place / source.name)
            copied.append(str(source.relative_to(model.pipeline)))
        fsync(place)
    return copied


def pipeline_bytes(model: Model | None) -> int:
    """Of the weights that :func:`copy_pipeline` would copy."""
    if model is None or model.pipeline is None:
        return 0
    others = (folder for folder in _members(model.pipeline) if folder.name != model.path.name)
    return sum(file.stat().st_size for folder in others for file in _copied_weights(folder))


def _members(pipeline: Path) -> list[Path]:
    """The directories of its components; none if it is no pipeline."""
    listed: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        found = json.loads((pipeline / _PIPELINE).read_bytes())
        listed = found if isinstance(found, dict) else {}
    return [
        pipeline / name for name in listed if is_plain_name(name) and (pipeline / name).is_dir()
    ]


def _copied_weights(folder: Path) -> list[Path]:
    files = _weights(folder)
    is_torch = not all(file.endswith(_WEIGHTS) for file in files)
    indexes = _TORCH_INDEXES if is_torch else [INDEX.format(_stem(folder, files))]
    return [
        folder / name
        for name in (*files, *indexes)
        if (folder / name).is_file() and lies_in(folder / name, folder.resolve())
    ]


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as opened, new_small_file(target) as file:
        shutil.copyfileobj(opened, file)


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """A ``config.json`` that names another dtype, for the model and its parts.

    What has no field for it gets one if it is transformers'; others do not know it.
    """
    try:
        text = config.decode()
    except ValueError:
        return config
    changed, count = _DTYPE_FIELD.subn(rf'\g<1>"{dtype}"', text)
    with suppress(ValueError):
        found = json.loads(changed)
        if isinstance(found, dict) and "model_type" in found and not count:
            changed = json.dumps(found | {"dtype": dtype}, indent=2, ensure_ascii=False) + "\n"
    return changed.encode()


def has_description(path: Path, model: Model) -> bool:
    """Whether a directory has what was copied from a model to it, byte for byte but for dtypes."""
    roots = [(model.path, path / model.folder)]
    if model.pipeline is not None:
        roots.append((model.pipeline, path))
    return all(
        (place / source.name).is_file() and _alike(source, place / source.name)
        for root, place in roots
        for source in _description(root, trust_code=model.trust_code)
    )


def _alike(source: Path, copy: Path) -> bool:
    both = [file.read_bytes() for file in (source, copy)]
    if source.name == CONFIG:
        both = [_with_dtype(text, "float32") for text in both]
    return both[0] == both[1]


def left_out_code(model: Model) -> list[str]:
    """Names of Python files that belong to a model and are not copied."""
    if model.trust_code or not model.path.is_dir():
        return []
    return [file.name for file in sorted(model.path.iterdir()) if fnmatchcase(file.name, _CODE)]


def _description(path: Path, *, trust_code: bool) -> list[Path]:
    if not path.is_dir():
        return []
    patterns = (*_DESCRIPTION, _CODE) if trust_code else _DESCRIPTION
    return [
        file
        for file in sorted(path.iterdir())
        if any(fnmatchcase(file.name.lower(), pattern) for pattern in patterns)
        and file.is_file()
        and lies_in(file, path.resolve())
    ]


def write_index(target: Path, files: Mapping[str, Sequence[Named]], stem: str) -> None:
    """Write the index of a model, given what each of its files holds; a single file needs none."""
    if len(files) == 1:
        return
    total = sum(output.num_bytes for group in files.values() for output in group)
    weight_map = {output.name: name for name, group in files.items() for output in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    write_durably(target / INDEX.format(stem), f"{text}\n".encode())
