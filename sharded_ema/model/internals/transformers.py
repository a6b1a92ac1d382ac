"""How transformers lays a model out in files: which of its tensors are renamed, cut or joined.

Since version 5 the modules of some models hold in one tensor what released files hold in many, such
as the experts of a mixture, or the other way round. The library reverts that when it saves. Here
this is done with tensors that have no memory, of which only the way is followed. Seen in
transformers 5.0 to 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from sharded_ema.model.layout import Shape

#: Elements of a named tensor, from one to before another, in C order.
Part = tuple[str, int, int]


def as_saved(
    path: Path, shapes: Mapping[str, Shape], released: Iterable[str]
) -> dict[str, tuple[Shape, list[Part] | None]]:
    """What the files of a model hold, and which parts of its tensors each is made of.

    Args:
        path: the directory with its ``config.json``.
        shapes: of the tensors of the model by name.
        released: names in the files that it was or could have been loaded from.

    Returns:
        By name in a file the shape, and the parts that fill it in C order; ``None`` in their place
        if the elements are taken in another order.

    Raises:
        OSError, ValueError, RuntimeError: transformers does not know the model, or cannot make it
            without memory.
    """
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise ValueError(f"transformers has no class {config.architectures}")
    with torch.device("meta"):
        model = kind(config)
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    # As loading does: what changes no name of the release is not reverted either.
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    for name in released:
        rename_source_key(name, renamings, converters)
    model._weight_conversions = [c for c in conversions if c.was_used()]
    with _Following(tensors) as following:
        saved = revert_weight_conversion(model, tensors)
    return {name: (tuple(t.shape), following.parts(t)) for name, t in saved.items()}


class _Following(TorchFunctionMode):
    """Follows what becomes of tensors that are cut, joined and seen in other shapes.

    Args:
        tensors: contiguous, each with a storage of its own.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        # By storage; tensors are held with them so that no other storage takes their place.
        self._known: dict[int, tuple[Tensor, list[Part]]] = {
            _storage(tensor): (tensor, [(name, 0, tensor.numel())])
            for name, tensor in tensors.items()
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.contiguous:  # would leave the storage, with the same elements
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.stack):
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            parts = [self.parts(tensor) for tensor in args[0]]
            if None not in parts and math.prod(result.shape[:dim]) == 1:
                joined = [part for of_one in parts if of_one is not None for part in of_one]
                self._known[_storage(result)] = (result, joined)
        return result

    def parts(self, tensor: Tensor) -> list[Part] | None:
        """Which elements of the first tensors fill this one; ``None`` if they are out of order."""
        if _storage(tensor) not in self._known or not tensor.is_contiguous():
            return None
        start = int(tensor.storage_offset())
        stop = start + tensor.numel()
        found, position = [], 0
        for name, first, last in self._known[_storage(tensor)][1]:
            begin, end = max(start, position), min(stop, position + last - first)
            if begin < end:
                found.append((name, first + begin - position, first + end - position))
            position += last - first
        return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
