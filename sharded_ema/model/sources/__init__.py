"""Finds out how a target is sharded and makes the source that reads it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.errors import BindError, UnsupportedLayoutError
from sharded_ema.model.changes import left_out
from sharded_ema.model.internals.fsdp1 import has_flattened
from sharded_ema.model.inventory import (
    Backup,
    Inventory,
    Named,
    Shard,
    ShardSource,
    adapters_of,
    take_inventory,
)
from sharded_ema.model.sources.ddp import DDPSource
from sharded_ema.model.sources.fsdp1 import make_fsdp1_source
from sharded_ema.model.sources.fsdp2 import FSDP2Source, reshard
from sharded_ema.model.sources.plain import PlainSource
from sharded_ema.model.sources.zero_engine import make_engine_source, refuse_partitioned

__all__ = [
    "Backup",
    "Inventory",
    "Named",
    "Shard",
    "ShardSource",
    "adapters_of",
    "left_out",
    "make_source",
]


def make_source(
    target: nn.Module,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    buffers: str,
    shard_replicas: bool,
) -> ShardSource:
    """Detect the layout of ``target``.

    Raises:
        BindError: the target is no module, or a parameter cannot be averaged.
        UnsupportedLayoutError: its layout is not supported; the message names it.
    """
    if any(cls.__name__ == "DeepSpeedEngine" for cls in type(target).__mro__):
        return make_engine_source(
            target,
            include=include,
            exclude=exclude,
            buffers=buffers,
            shard_replicas=shard_replicas,
        )
    if not isinstance(target, nn.Module):
        raise BindError(f"the target must be a torch.nn.Module, not {type(target).__name__}")
    modules = list(target.modules())
    _refuse_composable(modules)
    if has_flattened(target):
        return make_fsdp1_source(
            target,
            include=include,
            exclude=exclude,
            buffers=buffers,
            shard_replicas=shard_replicas,
        )
    if any(isinstance(m, FSDPModule) for m in modules):
        reshard(target)
    inventory = take_inventory(target, include, exclude, buffers)
    refuse_partitioned(inventory)
    if any(isinstance(n.tensor, DTensor) for n in (*inventory.averaged, *inventory.frozen)):
        return FSDP2Source(target, inventory, shard_replicas=shard_replicas)
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            return DDPSource(module, inventory, shard_replicas=shard_replicas)
    return PlainSource(target, inventory)


def _refuse_composable(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        names = {cls.__module__ for cls in type(module).__mro__}
        if "torch.distributed._composable.replicate" in names:
            raise UnsupportedLayoutError(
                f"a {type(module).__name__} was wrapped by the replicate() of torch.distributed."
                "_composable, which names its ranks only at the first forward; use "
                "DistributedDataParallel, fully_shard on a mesh of two axes, or the replicate() of "
                "torch.distributed._composable.replicate_with_fsdp"
            )
