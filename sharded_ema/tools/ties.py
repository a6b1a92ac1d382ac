"""Tied weights: one tensor of a model that files may hold under any of its names, or several.

Checkpoints of this library say which names are tied. A Hugging Face directory says in its
``config.json`` that the embedding and the head are, but not what these are called there, so they
are known by the last parts of their names, and by their shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import xxhash

from sharded_ema.checkpoint.checked_json import load_json
from sharded_ema.checkpoint.files import read_whole
from sharded_ema.checkpoint.reading.opened import Checkpoint, StoredTensor
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Shape

_CONFIG = "config.json"
_FLAG = "tie_word_embeddings"
_MAX_CONFIG_BYTES = 1 << 24
# As models of transformers call them (``_tied_weights_keys``), the embedding first.
_EMBEDDINGS = (
    "embed_tokens", "shared", "word_embeddings", "word_embedding", "wte", "embed_in",
    "tok_embeddings", "tokens_embed", "embeddings",
    "lm_head", "decoder", "embed_out", "proj_out", "output_projection", "output",
    "generator_lm_head", "vocab_projector", "unembedding_projection", "lm_loss",
)  # fmt: skip
_NAME = re.compile(rf"(.*\.)?({'|'.join(_EMBEDDINGS)})\.weight", re.S)


class Weights(Protocol):
    """Weights whose names may be tied; see :class:`~sharded_ema.tools.contents.Average`."""

    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def tensors(self) -> dict[str, StoredTensor]: ...
    @property
    def aliases(self) -> Mapping[str, list[str]]: ...


def tied_names(sets: Sequence[Weights]) -> list[set[str]]:
    """Names of one tensor each, of all that some sets of weights of one model have."""
    groups = [{name, *others} for each in sets for name, others in each.aliases.items()]
    if any(_ties_embeddings(each.checkpoint) for each in sets):
        by_shape: dict[Shape, set[str]] = {}
        for each in sets:
            for name, tensor in each.tensors.items():
                if tensor.is_read and _NAME.fullmatch(name):
                    by_shape.setdefault(tensor.shape, set()).add(name)
        groups += by_shape.values()
    return [group for group in groups if len(group) > 1]


def aliases_of(
    weights: Weights, groups: Iterable[set[str]], others: Iterable[Weights]
) -> dict[str, list[str]]:
    """Further names of tensors by one that they are stored under, where others have other ones.

    Tensors that are stored under several names and are not equal are not tied, whatever is said.

    Args:
        groups: of :func:`tied_names`.
        others: to match.

    Raises:
        CheckpointCorruptError: data that had to be looked at is damaged.
    """
    found = {name: list(names) for name, names in weights.aliases.items()}
    known = {name for names in found.values() for name in names} | found.keys()
    for group in groups:
        stored = [name for name in weights.tensors if name in group]
        if not stored or group <= known:
            continue
        if all(group & other.tensors.keys() == set(stored) for other in others):
            continue
        if _are_equal([weights.tensors[name] for name in stored]):
            found[stored[0]] = sorted(group - {stored[0]})
    return found


def _are_equal(tensors: Sequence[StoredTensor]) -> bool:
    if len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1:
        return False
    return len(tensors) == 1 or len(set(map(_digest, tensors))) == 1


def _digest(tensor: StoredTensor) -> str:
    digest = xxhash.xxh3_128()
    for block in tensor.blocks():
        digest.update(block.data)
    return str(digest.hexdigest())


def _ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether a configuration beside the weights ties embedding and head, as models mostly do."""
    if not isinstance(checkpoint.path, Path) or not (checkpoint.path / _CONFIG).is_file():
        return False
    with suppress(CheckpointCorruptError):
        file = checkpoint.path / _CONFIG
        config: dict[str, Any] = load_json(read_whole(file, _MAX_CONFIG_BYTES), str(file))
        inner = [value for value in config.values() if isinstance(value, dict)]
        said = [part[_FLAG] for part in (config, *inner) if _FLAG in part]
        return True in said or not said
    return False
