"""An unsharded module: one process, or equal copies that the user keeps equal himself."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from sharded_ema.model.inventory import (
    Inventory,
    Shard,
    ShardSource,
    copy_into,
    read,
)
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import whole


class PlainSource(ShardSource):
    """Every rank averages the whole model; rank 0 writes it.

    Where a process group exists its ranks must hold the same parameters, which is checked when
    the ranks first agree: values that differ would otherwise be lost but for one rank's.
    """

    kind = "plain"

    def __init__(self, model: nn.Module, inventory: Inventory) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.ranks = list(range(dist.get_world_size())) if distributed else []
        self.inventory = inventory
        self.shards = [
            Shard(n, tuple(n.tensor.shape), Box.whole(n.tensor.shape), writes=self.is_first_rank)
            for n in inventory.averaged
        ]

        self._tensors = [named.tensor for named in inventory.averaged]
        self._fixed = all(isinstance(tensor, nn.Parameter) for tensor in self._tensors)

    def live(self) -> list[Tensor]:
        # Parameter objects stay; only averaged buffers must be looked up every time.
        return self._tensors if self._fixed else [read(s.name) for s in self.shards]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not self.ranks:
            return list(tensors)
        return [whole(tensor, writes=self.is_first_rank) for tensor in tensors]

    def swap_targets(self) -> list[Tensor]:
        return self.live()

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        copy_into(self.swap_targets(), tensors)

    def loose(self) -> dict[str, tuple[Box, Tensor]]:
        return {n.fqn: (Box.whole(n.shape), n.tensor) for n in self.inventory.parameters}
