"""Finds out how a target is sharded and makes the source that reads it."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.errors import BindError, UnsupportedLayoutError
from sharded_ema.model.internals.deepspeed import is_engine
from sharded_ema.model.internals.fsdp1 import has_flattened
from sharded_ema.model.internals.fsdp2 import reshard
from sharded_ema.model.internals.pytorch import is_composable_replica
from sharded_ema.model.inventory import Selection, take_inventory
from sharded_ema.model.sources.ddp import make_ddp_source
from sharded_ema.model.sources.deepspeed import make_engine_source, refuse_partitioned
from sharded_ema.model.sources.fsdp1 import make_fsdp1_source
from sharded_ema.model.sources.fsdp2 import make_fsdp2_source
from sharded_ema.model.sources.plain import make_plain_source
from sharded_ema.model.sources.protocol import Source


def make_source(target: nn.Module, selection: Selection, *, shard_replicas: bool) -> Source:
    """Detect the layout of ``target``; more special ones come first.

    Args:
        selection: which of its tensors are averaged.
        shard_replicas: whether replicas share the work.

    Raises:
        BindError: the target is no module, or a parameter cannot be averaged.
        UnsupportedLayoutError: its layout is not supported; the message names it.
        FrameworkVersionError: a framework lacks something that reading it takes.
    """
    if is_engine(target):
        return make_engine_source(target, selection, shard_replicas=shard_replicas)
    if not isinstance(target, nn.Module):
        raise BindError(f"the target must be a torch.nn.Module, not {type(target).__name__}")
    modules = list(target.modules())
    for module in modules:
        _refuse_composable(module)
    if has_flattened(target):
        return make_fsdp1_source(target, selection, shard_replicas=shard_replicas)
    if any(isinstance(m, FSDPModule) for m in modules):
        reshard(target)
    inventory = take_inventory(target, selection)
    refuse_partitioned(inventory)
    if any(isinstance(n.tensor, DTensor) for n in (*inventory.averaged, *inventory.frozen)):
        return make_fsdp2_source(target, inventory, shard_replicas=shard_replicas)
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            return make_ddp_source(module, inventory, shard_replicas=shard_replicas)
    return make_plain_source(inventory)


def _refuse_composable(module: nn.Module) -> None:
    if is_composable_replica(module):
        raise UnsupportedLayoutError(
            f"a {type(module).__name__} was wrapped by the replicate() of torch.distributed."
            "_composable, which names its ranks only at the first forward; use "
            "DistributedDataParallel, fully_shard on a mesh of two axes, or the replicate() of "
            "torch.distributed._composable.replicate_with_fsdp"
        )
