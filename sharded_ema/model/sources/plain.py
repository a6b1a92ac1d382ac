"""An unsharded module: one process, or equal copies that the user keeps equal himself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from sharded_ema.model.inventory import (
    Inventory,
    Named,
    Selection,
    refuse_partitioned,
    take_inventory,
)
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import whole
from sharded_ema.model.sources.protocol import Copy, FollowsOptimizers, InPlace, Shard, Source


class PlainShards:
    """Every rank averages all that it holds.

    Where a process group exists its ranks hold the same parameters, or each a stage of a pipeline,
    which is found out when they meet: of equal tensors one rank writes its own.
    """

    kind = "plain"
    is_pipeline = False

    def __init__(self, inventory: Inventory) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.ranks = list(range(dist.get_world_size())) if distributed else []
        self.stage = [dist.get_rank()] if distributed else []
        self.inventory = inventory
        self.shards = [Shard(named, Box.whole(named.shape)) for named in inventory.averaged]

    def live(self) -> list[Tensor]:
        return self.inventory.averaged_now()

    def stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not self.ranks:
            return list(tensors)
        return [whole(tensor) for tensor in tensors]

    def stored_apart(self, named: Named) -> Tensor:
        return whole(named.read().detach(), reads=False)

    def copies(self) -> Mapping[str, Copy]:
        return {
            n.fqn: Copy(Box.whole(n.shape), n.tensor, synchronised=False)
            for n in self.inventory.readable
        }

    def self_check(self) -> None:
        pass  # a parameter is held once


def recognises(target: object) -> bool:
    """Whether the target is a module."""
    return isinstance(target, nn.Module)


def make_source(target: nn.Module, selection: Selection, *, shard_replicas: bool) -> Source:
    """The source of a module that nothing has sharded."""
    inventory = take_inventory(target, selection)
    refuse_partitioned(inventory)
    shards = PlainShards(inventory)
    return Source(shards, InPlace(shards.live), FollowsOptimizers(inventory))
