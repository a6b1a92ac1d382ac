"""The Hugging Face model directory: what to copy from one, and its index of files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from sharded_ema.checkpoint.durable import new_small_file, write_durably
from sharded_ema.checkpoint.files import as_path, lies_in
from sharded_ema.checkpoint.reading.models import (
    ADAPTER_CONFIG,
    INDEX,
    STEMS,
    holds_model,
    open_model,
)
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
        shapes: of its tensors by name in file order; ``None`` if it holds no weights.
        is_adapter: whether it is a PEFT adapter, and no whole model.
        trust_code: whether Python files belong to its description.
    """

    path: Path
    shapes: dict[str, Shape] | None
    is_adapter: bool = False
    trust_code: bool = False


def read_like(like: str | os.PathLike[str] | None, *, trust_code: bool) -> Model | None:
    """The model that an output is to be like, if it is to be like any.

    Raises:
        ConfigError, CheckpointError: see :func:`as_path` and :func:`read_model`.
    """
    return None if like is None else read_model(as_path(like, "like"), trust_code=trust_code)


def read_model(path: Path, *, trust_code: bool = False) -> Model:
    """Names and shapes of a model directory, or of a file of weights, from file headers only.

    Args:
        trust_code: see :class:`Model`.

    Raises:
        CheckpointNotFoundError: it does not exist, or lacks a file of its index.
        CheckpointCorruptError: its index or a header cannot be read.
    """
    if not path.is_dir() and not (path.is_file() and holds_model(path)):
        raise CheckpointNotFoundError(f"there is no model directory at {path}")
    shapes = None
    if holds_model(path):
        with open_model(path) as model:
            named = model.tensors | model.unread
            shapes = {name: tensor.shape for name, tensor in named.items()}
    return Model(path, shapes, (path / ADAPTER_CONFIG).is_file(), trust_code)


def copy_description(model: Model, target: Path) -> list[str]:
    """Copy configuration, tokenizer and the like; what else lies there stays where it is."""
    copied = []
    for source in _description(model.path, trust_code=model.trust_code):
        with open(source, "rb") as opened, new_small_file(target / source.name) as file:
            shutil.copyfileobj(opened, file)
        copied.append(source.name)
    return copied


def has_description(path: Path, like: Path, *, trust_code: bool = False) -> bool:
    """Whether a directory has what :func:`copy_description` would copy there, byte for byte."""
    return all(
        (path / source.name).is_file() and cmp(source, path / source.name, shallow=False)
        for source in _description(like, trust_code=trust_code)
    )


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


def write_index(target: Path, files: Mapping[str, Sequence[Named]]) -> None:
    """Write the index of a model, given what each of its files holds; a single file needs none."""
    if len(files) == 1:
        return
    total = sum(output.num_bytes for group in files.values() for output in group)
    weight_map = {output.name: name for name, group in files.items() for output in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    write_durably(target / INDEX.format(STEMS[0]), f"{text}\n".encode())
