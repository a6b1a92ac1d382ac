"""DistributedDataParallel: replicas that share the work."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.sources.base import Inventory, digest
from sharded_ema.sources.replicas import ReplicatedSource, equal_copies


class DDPSource(ReplicatedSource):
    """Each replica averages a slice of the parameters.

    Args:
        ddp: the DistributedDataParallel module inside the target.
        inventory: the tensors of the target.
        shard_replicas: see :class:`ReplicatedSource`.
    """

    kind = "ddp"

    def __init__(
        self, ddp: DistributedDataParallel, inventory: Inventory, *, shard_replicas: bool
    ) -> None:
        super().__init__(
            inventory,
            dist.get_process_group_ranks(ddp.process_group),
            equal_copies(inventory, ddp.process_group),
            shard_replicas=shard_replicas,
        )
        self._ddp = ddp

    def agreement_record(self) -> dict[str, str]:
        """Digests of parameters that are not DDP's to keep equal: outside it, or ignored by it."""
        ignored: set[str] = getattr(self._ddp, "parameters_to_ignore", set())
        kept = {id(p) for n, p in self._ddp.module.named_parameters() if n not in ignored}
        named = (*self.inventory.averaged, *self.inventory.frozen)
        return {
            n.fqn: digest(n.tensor)
            for n in named
            if isinstance(n.tensor, nn.Parameter) and id(n.tensor) not in kept
        }
