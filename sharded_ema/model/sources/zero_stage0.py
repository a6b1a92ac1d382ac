"""DeepSpeed without ZeRO (stage 0): replicas that share the work.

In fp32 the optimizer trains the parameters themselves. In 16-bit it keeps an fp32 master of each,
which is what is averaged, and the model's weights are the masters, rounded. Not at the very start:
to make its state the optimizer takes one step without gradients, whose weight decay reaches the
masters and not yet the weights (DeepSpeed 0.19.8).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharded_ema.errors import BindError
from sharded_ema.model.inventory import Backup, Inventory, is_rounded, read
from sharded_ema.model.sources.replicas import ReplicatedSource, whole_copy
from sharded_ema.model.sources.zero_pipeline import EngineSource

# How far weight decay may have moved a master; weights that were loaded behind it are further off.
_DECAYED = 2.0**-6


class Zero0Source(EngineSource, ReplicatedSource):
    """Each replica averages a slice of the masters, or of the parameters where they are one.

    Args:
        engine: a DeepSpeed engine.
        inventory: the tensors of its module.
        shard_replicas: see :class:`ReplicatedSource`.
    """

    kind = "zero-0"

    def __init__(self, engine: Any, inventory: Inventory, *, shard_replicas: bool) -> None:
        EngineSource.__init__(self, engine, inventory)
        self._places = _places(engine.optimizer)
        self._copies: set[int] = set()
        ReplicatedSource.__init__(
            self,
            inventory,
            self.ranks,
            [whole_copy(named, (self.replicas,)) for named in inventory.averaged],
            shard_replicas=shard_replicas,
        )
        self.shards = [
            replace(shard, writes=shard.writes and not self.is_borrowed(shard.name.fqn))
            for shard in self.shards
        ]

    def averaged_tensor(self, index: int) -> Tensor:
        named = self.inventory.averaged[index]
        place = self._places.get(id(named.tensor))
        if place is None:
            return read(named)
        group, position, offset = place
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "fp32_groups"):
            return optimizer.fp32_groups[group][position].detach()
        flat = optimizer.fp32_groups_flat[group].detach()
        return flat.narrow(0, offset, named.tensor.numel()).view(named.tensor.shape)

    @torch.no_grad()
    def self_check(self) -> None:
        for index, named in enumerate(self.inventory.averaged):
            seen, master = read(named).float(), self.averaged_tensor(index).float()
            if not torch.allclose(seen, master, rtol=_DECAYED, atol=_DECAYED, equal_nan=True):
                raise BindError(
                    f"the weights of parameter {named.fqn} are not the masters of "
                    f"{type(self.engine.optimizer).__name__} in {named.tensor.dtype}: load "
                    "weights before deepspeed.initialize, or with engine.load_checkpoint"
                )

    def _is_copy(self, index: int) -> bool:
        """Whether the weights are the masters, rounded, and can be made from them again."""
        named = self.inventory.averaged[index]
        kept = id(named.tensor) in self._places
        return kept and is_rounded(named.tensor, self.averaged_tensor(index))

    def swap_targets(self) -> list[Tensor]:
        targets = super().swap_targets()
        return [t for i, t in enumerate(targets) if i not in self._copies]

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        self.fill(super().swap_targets(), tensors)

    def back_up(self) -> Backup:
        self._copies = {i for i in range(len(self.shards)) if self._is_copy(i)}
        return super().back_up()

    @torch.no_grad()
    def _refresh(self, indices: Iterable[int]) -> None:
        """Make weights from their masters again."""
        for index in indices:
            self.target_tensor(index).copy_(self.averaged_tensor(index))

    def restore(self, backup: Backup) -> None:
        super().restore(backup)
        self._refresh(self._copies)

    def keep(self, tensors: Sequence[Tensor]) -> None:
        self.fill([self.averaged_tensor(i) for i in range(len(self.shards))], tensors)
        self._refresh(range(len(self.shards)))


def _places(optimizer: Any) -> dict[int, tuple[int, int, int]]:
    """Group, position in it and offset in its flat buffer of every parameter with a master."""
    found = {}
    for number, group in enumerate(getattr(optimizer, "fp16_groups", ())):
        offset = 0
        for position, parameter in enumerate(group):
            found[id(parameter)] = (number, position, offset)
            offset += parameter.numel()
    return found
