"""The names that the ``state_dict()`` of the bare model gives its tensors.

They are those of the modules, without the wrappers, unless a module changes them: hooks may rename
what is stored, ``_save_to_state_dict`` store it in a way of its own, ``get_extra_state`` add what
is no tensor of the module. Then the state dict is put together as PyTorch does it, but of stand-ins
and past the wrappers, so that nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.model.internals.pytorch import (
    EXTRA_STATE,
    add_metadata,
    has_extra_state,
    is_persistent,
    new_state,
    own_buffers,
    own_children,
    save_instead,
    saves_itself,
    state_dict_hooks,
)

# Attributes through which wrappers hold the module they wrap. They are no part of the name that
# the bare model's state_dict() gives a parameter.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}


class Parts(nn.ModuleList):
    """Several modules that are one model, such as the pipeline stages that lie on this rank.

    Their tensors keep the names that they have in the modules.
    """


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with the prefix their tensors have before hooks change names.

    A shared module is met once under each of its names, as in ``state_dict()``.
    """
    yield prefix, module
    for inner, child in _children(prefix, module):
        yield from walk(child, inner)


def _children(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    is_parallel = isinstance(module, DistributedDataParallel | nn.DataParallel)
    is_parts = isinstance(module, Parts)
    children = own_children(module)
    for name, child in children.items():
        # Lightning Fabric holds a module twice: wrapped, and as it was.
        again = name == "_original_module" and "_forward_module" in children
        if child is not None and not again:
            wrapped = name in _WRAPPED or is_parts or (is_parallel and name == "module")
            yield (prefix if wrapped else f"{prefix}{name}."), child


@dataclass(slots=True)
class Keys:
    """Where the state dict of the bare model has what.

    Attributes:
        of_path: keys by the path of a parameter or buffer, ``layers.0.weight``; what is not in here
            goes by its path.
        made: keys of what is neither a parameter nor a buffer of a module.
        extra: modules with an extra state by its key.
    """

    of_path: dict[str, list[str]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    extra: dict[str, nn.Module] = field(default_factory=dict)

    def of(self, path: str) -> list[str]:
        """The keys of a tensor; none if the state dict lacks it."""
        return self.of_path.get(path, [path])


def find_keys(
    model: nn.Module, parameters: Callable[[nn.Module], Iterable[tuple[str, Tensor]]]
) -> Keys:
    """The keys of a model's tensors; nothing is gathered or copied.

    Args:
        parameters: names there and tensors of one module itself.
    """
    if not any(map(_stores_otherwise, model.modules())):
        return Keys()
    found = _StateDict(parameters)
    state = found.add("", model)
    keys = Keys({path: [] for path in found.paths.values()})
    for key, value in state.items():
        if id(value) in found.extra:
            keys.extra[key] = found.extra[id(value)]
        elif id(value) in found.paths:
            keys.of_path[found.paths[id(value)]].append(key)
        elif key in keys.of_path:  # converted or moved on the way
            keys.of_path[key].append(key)
        else:
            keys.made.append(key)
    return keys


def _stores_otherwise(module: nn.Module) -> bool:
    return bool(state_dict_hooks(module)) or saves_itself(module) or has_extra_state(module)


class _StateDict:
    """A state dict of stand-ins, and what each of them stands for.

    Attributes:
        paths: of parameters and buffers, by the id of their stand-in.
        extra: modules, by the id of the stand-in for their extra state.
    """

    def __init__(self, parameters: Callable[[nn.Module], Iterable[tuple[str, Tensor]]]) -> None:
        self._parameters = parameters
        self._state = new_state()
        self.paths: dict[int, str] = {}
        self.extra: dict[int, nn.Module] = {}
        self._alive: list[Tensor] = []

    @torch.no_grad()
    def add(self, prefix: str, module: nn.Module) -> dict[str, Any]:
        """What ``module.state_dict()`` returns, with the keys of what is around it."""
        said = add_metadata(self._state, prefix, module)
        parameters = {n: self._stand_in(prefix + n, t) for n, t in self._parameters(module)}
        buffers = {
            n: self._stand_in(prefix + n, b) if b is not None and is_persistent(module, n) else b
            for n, b in own_buffers(module).items()
        }
        save_instead(module, parameters, buffers, self._state, prefix)
        key = prefix + EXTRA_STATE
        if has_extra_state(module) and key in self._state:
            self._state[key] = self._stand_in_for_extra(module)
        for inner, child in _children(prefix, module):
            self.add(inner, child)
        result = self._state
        for hook in state_dict_hooks(module):
            changed = hook(module, result, prefix, said)
            result = result if changed is None else changed
        return result  # which only the outermost module's caller takes

    def _stand_in(self, path: str, tensor: Tensor) -> Tensor:
        """A tensor of its own for each place of a tensor, since tied ones have several."""
        twin = tensor.detach()
        self._alive.append(twin)
        self.paths[id(twin)] = path
        return twin

    def _stand_in_for_extra(self, module: nn.Module) -> Tensor:
        twin = torch.empty(0, device="cpu")
        self._alive.append(twin)
        self.extra[id(twin)] = module
        return twin
