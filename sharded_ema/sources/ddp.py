"""DistributedDataParallel: replicas that share the work."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.layout import Box
from sharded_ema.sources.base import Inventory, whole_digest
from sharded_ema.sources.replicas import ReplicatedSource, whole_copy


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
            [whole_copy(named, (ddp.process_group,)) for named in inventory.averaged],
            shard_replicas=shard_replicas,
        )
        self._ddp = ddp

    def agreement_record(self) -> dict[str, tuple[Box, str]]:
        """Digests of parameters that are not DDP's to keep equal: outside it, or ignored by it."""
        ignored: set[str] = getattr(self._ddp, "parameters_to_ignore", set())
        kept = {id(p) for n, p in self._ddp.module.named_parameters() if n not in ignored}
        return {
            n.fqn: whole_digest(n.tensor)
            for n in self.inventory.parameters
            if id(n.tensor) not in kept
        }
