"""DistributedDataParallel: replicas that share the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.internals.pytorch import ignored_by_ddp, is_taken_from_a_dtensor
from sharded_ema.model.inventory import (
    Inventory,
    Named,
    Selection,
    refuse_partitioned,
    take_inventory,
)
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import whole
from sharded_ema.model.sources.protocol import Copy, FollowsOptimizers, InPlace, Source
from sharded_ema.model.sources.replicas import Shares, leads, whole_copy


class DDPShards:
    """Each replica averages a slice of the parameters.

    Args:
        wrapped: the DistributedDataParallel modules inside the target.
        inventory: the tensors of the target.
        shard_replicas: see :class:`Shares`.

    Raises:
        UnsupportedLayoutError: a module had DTensors before it was wrapped, or they replicate over
            different ranks.
    """

    kind = "ddp"
    is_pipeline = False

    def __init__(
        self,
        wrapped: Sequence[DistributedDataParallel],
        inventory: Inventory,
        *,
        shard_replicas: bool,
    ) -> None:
        for named in inventory.parameters:
            if is_taken_from_a_dtensor(named.tensor):
                raise UnsupportedLayoutError(
                    f"parameter {named.fqn} is the local tensor of a DTensor, in which "
                    "DistributedDataParallel hides tensor parallelism; replicate the model with "
                    "fully_shard on a mesh of two axes instead"
                )
        groups = (wrapped[0].process_group,)
        over = [dist.get_process_group_ranks(ddp.process_group) for ddp in wrapped]
        if any(ranks != over[0] for ranks in over):
            raise UnsupportedLayoutError(
                "the DistributedDataParallel modules in the target replicate over different ranks, "
                f"such as {over[0]} and {next(r for r in over if r != over[0])}; wrap all of a "
                "model with one process group"
            )
        self.ranks = self.stage = over[0]
        self.inventory = inventory
        self.shares = Shares(
            inventory,
            [whole_copy(named, groups) for named in inventory.averaged],
            inventory.averaged_now(),
            shard_replicas=shard_replicas,
        )
        self.shards = self.shares.shards
        self._writes = leads(groups)
        self._wrapped = wrapped

    def live(self) -> list[Tensor]:
        return self.shares.cut(self.inventory.averaged_now())

    def stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.shares.stored(tensors)

    def stored_apart(self, named: Named) -> Tensor:
        return whole(named.read().detach(), writes=self._writes, reads=False)

    def copies(self) -> Mapping[str, Copy]:
        """All parameters. Those outside DDP, or ignored by it, are not its to keep equal."""
        kept = {
            id(parameter)
            for ddp in self._wrapped
            for name, parameter in ddp.module.named_parameters()
            if name not in ignored_by_ddp(ddp)
        }
        return {
            n.fqn: Copy(Box.whole(n.shape), n.tensor, synchronised=id(n.tensor) in kept)
            for n in self.inventory.readable
        }

    def self_check(self) -> None:
        pass  # a parameter is held once


def recognises(target: object) -> bool:
    """Whether DistributedDataParallel has wrapped a module, or a part of it."""
    return isinstance(target, nn.Module) and any(map(_is_ddp, target.modules()))


def make_source(target: nn.Module, selection: Selection, *, shard_replicas: bool) -> Source:
    """The source of such a module."""
    inventory = take_inventory(target, selection)
    refuse_partitioned(inventory)
    wrapped = [m for m in target.modules() if isinstance(m, DistributedDataParallel)]
    shards = DDPShards(wrapped, inventory, shard_replicas=shard_replicas)
    shares = shards.shares
    stand_in = InPlace(inventory.averaged_now, shares.fill, together=shares.together)
    return Source(shards, stand_in, FollowsOptimizers(inventory))


def _is_ddp(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel)
