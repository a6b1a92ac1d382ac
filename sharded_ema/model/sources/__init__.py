"""Finds out how a target is sharded and makes the source that reads it.

Every framework is a module beside this one, with a function that recognises its targets and one
that makes their source. The first of :data:`FRAMEWORKS` that recognises a target is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import nn

from sharded_ema.errors import BindError, ConfigError, UnsupportedLayoutError
from sharded_ema.model.internals.pytorch import is_composable_replica
from sharded_ema.model.inventory import Selection
from sharded_ema.model.sources import ddp, deepspeed, fsdp1, fsdp2, plain
from sharded_ema.model.sources.protocol import ReadsShards, Source


class Framework(Protocol):
    """What a module of a framework offers."""

    def recognises(self, target: object) -> bool:
        """Whether this framework has laid out the target."""
        ...

    def make_source(
        self, target: nn.Module, selection: Selection, *, shard_replicas: bool
    ) -> Source:
        """The source of a target that is recognised."""
        ...


#: More special ones come first; the last takes every module.
FRAMEWORKS: list[Framework] = [deepspeed, fsdp1, fsdp2, ddp, plain]


def make_source(
    target: nn.Module,
    selection: Selection,
    process_group: dist.ProcessGroup | None = None,
    *,
    shard_replicas: bool,
) -> Source:
    """The source of a target.

    Args:
        selection: which of its tensors are averaged.
        process_group: over all ranks of the model; ``None`` if its layout says which these are.
        shard_replicas: whether replicas share the work.

    Raises:
        BindError: the target is no module, or a parameter cannot be averaged.
        ConfigError: the group lacks ranks that hold the same tensors as this one.
        UnsupportedLayoutError: its layout is not supported; the message names it.
        FrameworkVersionError: a framework lacks something that reading it takes.
    """
    framework = next((f for f in FRAMEWORKS if f.recognises(target)), None)
    if framework is None:
        raise BindError(f"the target must be a torch.nn.Module, not {type(target).__name__}")
    for module in target.modules():
        _refuse_composable(module)
    source = framework.make_source(target, selection, shard_replicas=shard_replicas)
    if process_group is not None:
        _spread(source.reader, dist.get_process_group_ranks(process_group))
    return source


def _spread(reader: ReadsShards, ranks: Sequence[int]) -> None:
    """Let the model be that of other ranks than its layout says."""
    missing = sorted(set(reader.stage) - set(ranks))
    if missing:
        raise ConfigError(
            f"process_group has the ranks {sorted(ranks)} and lacks {missing}, which hold shards "
            "or replicas of the same parameters; pass a group over all ranks of the model"
        )
    reader.ranks = sorted(ranks)


def _refuse_composable(module: nn.Module) -> None:
    if is_composable_replica(module):
        raise UnsupportedLayoutError(
            f"a {type(module).__name__} was wrapped by the replicate() of torch.distributed."
            "_composable, which names its ranks only at the first forward; use "
            "DistributedDataParallel, fully_shard on a mesh of two axes, or the replicate() of "
            "torch.distributed._composable.replicate_with_fsdp"
        )
