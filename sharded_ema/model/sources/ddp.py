"""DistributedDataParallel: replicas that share the work."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.inventory import Inventory
from sharded_ema.model.layout import Box
from sharded_ema.model.sources.replicas import ReplicatedSource, whole_copy


class DDPSource(ReplicatedSource):
    """Each replica averages a slice of the parameters.

    Args:
        ddp: the DistributedDataParallel module inside the target.
        inventory: the tensors of the target.
        shard_replicas: see :class:`ReplicatedSource`.

    Raises:
        UnsupportedLayoutError: the module had DTensors before it was wrapped.
    """

    kind = "ddp"

    def __init__(
        self, ddp: DistributedDataParallel, inventory: Inventory, *, shard_replicas: bool
    ) -> None:
        for named in inventory.parameters:
            # What DDP on a mesh leaves where it took a DTensor's local tensor out.
            if hasattr(named.tensor, "_st_info"):
                raise UnsupportedLayoutError(
                    f"parameter {named.fqn} is the local tensor of a DTensor, in which "
                    "DistributedDataParallel hides tensor parallelism; replicate the model with "
                    "fully_shard on a mesh of two axes instead"
                )
        super().__init__(
            inventory,
            dist.get_process_group_ranks(ddp.process_group),
            [whole_copy(named, (ddp.process_group,)) for named in inventory.averaged],
            shard_replicas=shard_replicas,
        )
        self._ddp = ddp

    def loose(self) -> dict[str, tuple[Box, Tensor]]:
        """Parameters that are not DDP's to keep equal: outside it, or ignored by it."""
        ignored: set[str] = getattr(self._ddp, "parameters_to_ignore", set())
        kept = {id(p) for n, p in self._ddp.module.named_parameters() if n not in ignored}
        return {
            n.fqn: (Box.whole(n.shape), n.tensor)
            for n in self.inventory.parameters
            if id(n.tensor) not in kept
        }
