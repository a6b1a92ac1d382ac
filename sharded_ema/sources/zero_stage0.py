"""DeepSpeed without ZeRO (stage 0): replicas that share the work.

In fp32 the optimizer trains the parameters themselves. In 16-bit it keeps an fp32 master of each,
which is what is averaged, and the model's weights are the masters, rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_ema.errors import BindError
from sharded_ema.sources.base import Backup, Inventory, is_rounded, read
from sharded_ema.sources.replicas import ReplicatedSource, whole_copy


class Zero0Source(ReplicatedSource):
    """Each replica averages a slice of the masters, or of the parameters where they are one.

    Args:
        engine: a DeepSpeed engine.
        inventory: the tensors of its module.
        group: process group of the replicas.
        shard_replicas: see :class:`ReplicatedSource`.
    """

    kind = "zero-0"

    def __init__(
        self,
        engine: Any,
        inventory: Inventory,
        group: dist.ProcessGroup,
        *,
        shard_replicas: bool,
    ) -> None:
        self.engine = engine
        self._places = _places(engine.optimizer)
        super().__init__(
            inventory,
            dist.get_process_group_ranks(group),
            [whole_copy(named, (group,)) for named in inventory.averaged],
            shard_replicas=shard_replicas,
        )

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
            if not is_rounded(read(named), self.averaged_tensor(index)):
                raise BindError(
                    f"the weights of parameter {named.fqn} are not the masters of "
                    f"{type(self.engine.optimizer).__name__} in {named.tensor.dtype}: load "
                    "weights before deepspeed.initialize, or with engine.load_checkpoint"
                )

    def swap_targets(self) -> list[Tensor]:
        """The parameters that are no copy of a master, and averaged buffers."""
        averaged = self.inventory.averaged
        return [read(n) for n in averaged if id(n.tensor) not in self._places]

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        self.fill(super().swap_targets(), tensors)

    def back_up(self) -> Backup:
        # What is restored are the masters, rounded; so that must be what is there now.
        self.self_check()
        return super().back_up()

    @torch.no_grad()
    def _refresh(self) -> None:
        for index, named in enumerate(self.inventory.averaged):
            if id(named.tensor) in self._places:
                named.tensor.copy_(self.averaged_tensor(index))

    def restore(self, backup: Backup) -> None:
        super().restore(backup)
        self._refresh()

    def keep(self, tensors: Sequence[Tensor]) -> None:
        self.fill([self.averaged_tensor(i) for i in range(len(self.shards))], tensors)
        self._refresh()


def _places(optimizer: Any) -> dict[int, tuple[int, int, int]]:
    """Group, position in it and offset in its flat buffer of every parameter with a master."""
    found = {}
    for number, group in enumerate(getattr(optimizer, "fp16_groups", ())):
        offset = 0
        for position, parameter in enumerate(group):
            found[id(parameter)] = (number, position, offset)
            offset += parameter.numel()
    return found
