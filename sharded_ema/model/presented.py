"""Parameters that a forward sees otherwise than they are kept: converted, or put together.

Whoever asks a module for such a parameter in a forward gets what is made of it then and is freed
with its last use. That need not be the module's own forward: attention reads the weight of its
projection, and a head that of an embedding. The registered parameter stays as it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.internals.pytorch import local_tensor, own_parameters, placed_like
from sharded_ema.model.sources.replicas import Shares


class Running:
    """Tells whether a forward of some modules goes on."""

    def __init__(self, root: nn.Module) -> None:
        self._watched: set[nn.Module] = set()
        self._now: set[nn.Module] = set()
        self.watch(root)

    def watch(self, module: nn.Module) -> None:
        if module not in self._watched:
            self._watched.add(module)
            module.register_forward_pre_hook(lambda m, _: self._now.add(m), prepend=True)
            module.register_forward_hook(lambda m, _, __: self._now.discard(m), always_call=True)

    def __bool__(self) -> bool:
        return bool(self._now)


def present(
    module: nn.Module, name: str, made: Callable[[Tensor], Tensor], running: Running
) -> None:
    """Let a forward find under the name of a parameter what is ``made`` of it."""

    def found(self: nn.Module) -> Tensor:
        parameter = own_parameters(self)[name]
        assert parameter is not None
        return made(parameter.detach()) if running else parameter

    running.watch(module)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: property(found)})


class Whole:
    """All of a parameter, of which this rank keeps a part.

    Collective, whenever it is asked for: over the replicas that share its average, then over the
    ranks that ``fully_shard`` divides it over. Nothing is kept of it.

    Args:
        parameter: of the model that trains; it tells shape, strides and placements.
        shares: how the replicas divide averages.
        index: position of the average among the shards; ``None`` if no replicas share it.
        gathered: whether a forward needs it gathered; else its placements stay, as those of tensor
            parallelism do.
        dtype: of the result; the pieces are sent in it.
    """

    def __init__(
        self,
        parameter: Tensor,
        shares: Shares,
        index: int | None,
        *,
        gathered: bool,
        dtype: torch.dtype,
    ) -> None:
        self._like, self._shares, self._index = parameter, shares, index
        self._gathered, self._dtype = gathered, dtype

    @torch.no_grad()
    def __call__(self, own: Tensor) -> Tensor:
        """Of the part that this rank keeps."""
        like = self._like
        if self._index is None:
            block = own.to(self._dtype)
        else:
            local = local_tensor(like) if isinstance(like, DTensor) else like
            block = torch.empty_strided(
                local.shape, local.stride(), dtype=self._dtype, device=own.device
            )
            self._shares.fill_one(self._index, block, own)
        if not isinstance(like, DTensor):
            return block
        placed = placed_like(like, block)
        return placed.full_tensor() if self._gathered else placed


def refuse_kept_elsewhere(model: nn.Module, parts: Mapping[int, str]) -> None:
    """Refuse modules that hold a parameter in an attribute, too, which would show their part of it.

    Args:
        parts: names of the parameters that are kept in parts, by identity.

    Raises:
        UnsupportedLayoutError: there is one, as a recurrent layer with its list of weights.
    """
    registered = nn.Module().__dict__.keys()
    for module in model.modules():
        for name, value in vars(module).items():
            if name in registered:
                continue
            hidden = [parts[id(t)] for t in _tensors_in(value) if id(t) in parts]
            if hidden:
                raise UnsupportedLayoutError(
                    f"a {type(module).__name__} holds {hidden[0]} in its attribute {name}, too, "
                    "where no forward can put it together; ema.module() needs "
                    "ShardedEMA(shard_replicas=False) for it"
                )


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (v for v in value.values() if isinstance(v, Tensor))
    elif isinstance(value, list | tuple):
        yield from (v for v in value if isinstance(v, Tensor))
