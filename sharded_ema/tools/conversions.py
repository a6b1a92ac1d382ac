"""From the tensors of a model in memory to those of its release.

transformers 5 holds the experts of a mixture in one tensor, released files hold them one by one.
The usual ways of that are known here; others are asked of transformers, where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from sharded_ema.errors import CheckpointMismatchError
from sharded_ema.model.layout import Shape
from sharded_ema.tools.assembly import Assembled, Stretch

# What a fused tensor is called after ``experts.``, and the parts of each expert in their order:
# those of Qwen, DeepSeek, GLM, OLMoE and others, and those of Mixtral, MiniMax and others.
_FUSED = (
    ("gate_up_proj", ("gate_proj.weight", "up_proj.weight")),
    ("down_proj", ("down_proj.weight",)),
    ("up_proj", ("up_proj.weight",)),
    ("gate_up_proj", ("w1.weight", "w3.weight")),
    ("down_proj", ("w2.weight",)),
)
# Of the module around them, in memory and in files.
_MODULE = (".mlp.", ".block_sparse_moe.")


def as_released(
    tensors: Mapping[str, Assembled], shapes: Mapping[str, Shape], model: Path
) -> dict[str, Assembled]:
    """The tensors under the names of a release; as they are if it has no other.

    Args:
        tensors: whole stored tensors by name.
        shapes: of the tensors of the release.
        model: its directory.

    Raises:
        CheckpointMismatchError: a tensor of the release is not a stretch of those in memory.
    """
    if tensors.keys() <= shapes.keys():
        return dict(tensors)
    found = _by_table(tensors, shapes)
    if found.keys() <= shapes.keys():
        return found
    return _by_transformers(tensors, shapes, model) or found


def _by_table(
    tensors: Mapping[str, Assembled], shapes: Mapping[str, Shape]
) -> dict[str, Assembled]:
    found: dict[str, Assembled] = {}
    for name, made in tensors.items():
        renamed = name.replace(*_MODULE)
        if name in shapes:
            found[name] = made
        elif shapes.get(renamed) == made.shape:
            found[renamed] = made
        else:
            apart = _experts(name, made, shapes) or _experts(renamed, made, shapes)
            found |= apart or {name: made}
    return found


def _experts(name: str, made: Assembled, shapes: Mapping[str, Shape]) -> dict[str, Assembled]:
    """The parts of a fused tensor, if the release has all of them with the shapes they must have.

    The fused one has shape ``(experts, parts * rows, columns)``.
    """
    module, mark, fused = name.rpartition("experts.")
    if not mark or len(made.shape) != 3:
        return {}
    experts, rows, columns = made.shape
    for known, parts in _FUSED:
        shape = (rows // len(parts), columns)
        names = [f"{module}experts.{e}.{part}" for e in range(experts) for part in parts]
        if known == fused and all(shapes.get(each) == shape for each in names):
            count = math.prod(shape)
            starts = range(0, len(names) * count, count)
            return {
                each: Assembled(shape, (Stretch(made.tensor, start, start + count),))
                for each, start in zip(names, starts, strict=True)
            }
    return {}


def _by_transformers(
    tensors: Mapping[str, Assembled], shapes: Mapping[str, Shape], model: Path
) -> dict[str, Assembled]:
    """What transformers would save; empty if it is not installed or does not know the model."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None or not (model / "config.json").is_file():
        return {}
    if not Path(spec.origin).with_name("conversion_mapping.py").is_file():  # before version 5
        return {}
    from sharded_ema.model.internals.transformers import as_saved  # imports PyTorch

    try:
        saved = as_saved(model, {name: made.shape for name, made in tensors.items()}, shapes)
    except (OSError, RuntimeError, ValueError):  # of its code for the model; names will differ
        return {}
    found = {}
    for name, (shape, parts) in saved.items():
        if parts is None:
            raise CheckpointMismatchError(
                f"{name} of {model} has its elements in another order than the average (it is "
                "transposed or interleaved), which is not done here; load the average into the "
                "model and save that with transformers"
            )
        stretches = tuple(Stretch(tensors[n].tensor, start, stop) for n, start, stop in parts)
        if len({stretch.tensor.dtype for stretch in stretches}) > 1:
            raise CheckpointMismatchError(
                f"{name} of {model} is joined of tensors of several dtypes, which is not done here"
            )
        found[name] = Assembled(shape, stretches)
    return found
