"""``FullyShardedDataParallel`` (FSDP1): each rank averages its shard of the flat parameters.

Neither padding nor frozen parameters between the trained ones are averaged. Units may be sharded,
replicated (``NO_SHARD``) or both (``HYBRID_SHARD``), even within one model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.errors import StateError, UnsupportedLayoutError
from sharded_ema.model.internals.fsdp1 import FlatParameters
from sharded_ema.model.inventory import (
    Inventory,
    Named,
    digest,
    read,
    take_inventory,
)
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import FlatShard, range_pieces
from sharded_ema.model.sources.replicas import Place, ReplicatedSource, leads, whole_copy


class FSDP1Source(ReplicatedSource):
    """Each rank averages its elements of the flat parameters, or slices of what is replicated.

    Args:
        flat: the flat parameters of the model.
        inventory: the tensors of the model.
        shard_replicas: see :class:`ReplicatedSource`.
    """

    kind = "fsdp1"

    def __init__(self, flat: FlatParameters, inventory: Inventory, *, shard_replicas: bool) -> None:
        self._flat = flat
        self._flattened = [flat.find(named) for named in inventory.averaged]
        super().__init__(
            inventory,
            flat.ranks,
            [self._place(named) for named in inventory.averaged],
            shard_replicas=shard_replicas,
        )
        self._parameters = [
            n.tensor for n in inventory.averaged if isinstance(n.tensor, nn.Parameter)
        ]
        self._buffers = [n for n in inventory.averaged if not isinstance(n.tensor, nn.Parameter)]
        self._seen: list[int] = []
        self._held: list[Tensor] = []

    def _place(self, named: Named) -> Place:
        found = self._flat.find(named)
        if found is None:
            return whole_copy(named, self._flat.groups)
        groups = found.unit.replicas
        return Place(Box.whole(named.shape), groups, leads(groups), found.range, found.order)

    def target_tensor(self, index: int) -> Tensor:
        found = self._flattened[index]
        return read(self.inventory.averaged[index]) if found is None else found.local()

    def live(self) -> list[Tensor]:
        pointers = [unit.shard.data_ptr() for unit in self._flat.units]
        pointers += map(Tensor.data_ptr, self._parameters)
        pointers += [read(named).data_ptr() for named in self._buffers]
        if pointers != self._seen:
            self._refuse_detached()
            self._held, self._seen = super().live(), pointers
        return self._held

    def _refuse_detached(self) -> None:
        """Refuse parameters that have left the shard, which then is not what is trained."""
        for named, found in zip(self.inventory.averaged, self._flattened, strict=True):
            if found is not None and found.is_detached():
                raise StateError(
                    f"parameter {named.fqn} no longer lies in its FSDP unit's shard: something "
                    "assigned param.data, or model.to() came after the first forward. Change "
                    "parameters in place, and move the model before it is first used"
                )

    def extra_value(self, named: Named) -> Tensor:
        found = self._flat.find(named)
        if found is None:
            return super().extra_value(named)
        local = found.local()
        return FlatShard(
            named.shape,
            range_pieces(Box.whole(named.shape), found.range, local, found.order),
            dtype=local.dtype,
            device=local.device,
            writes=leads(found.unit.replicas),
            reads=False,
        )

    def settle(self) -> None:
        for unit in self._flat.units:
            unit.reshard()

    def registered(self, named: Named) -> Tensor | None:
        found = self._flat.find(named)
        # The modules of a unit that shows the flat parameter have none that could be compared.
        return found.tensor if found and found.is_flat else super().registered(named)

    def loose(self) -> dict[str, tuple[Box, Tensor]]:
        plain = (n for n in self.inventory.parameters if self._flat.find(n) is None)
        return {n.fqn: (Box.whole(n.shape), n.tensor) for n in plain}

    def agreement_record(self) -> dict[str, tuple[Box, str]]:
        """Digests of plain parameters, and of what FSDP1 keeps equal but does not make so."""
        record = super().agreement_record()
        for named in self.inventory.parameters:
            found = self._flat.find(named)
            if found is not None and found.unit.replicas:
                elements = Box((found.range.start,), (found.range.numel,))
                record[named.fqn] = (elements, digest(found.local()))
        return record


def make_fsdp1_source(
    model: nn.Module,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    buffers: str,
    shard_replicas: bool,
) -> FSDP1Source:
    """The source for a model in which FSDP1 has flattened parameters.

    Raises:
        UnsupportedLayoutError: something of its layout is not supported; the message names it.
        BindError: a parameter cannot be averaged.
    """
    for module in model.modules():
        if isinstance(module, (DistributedDataParallel, FSDPModule)):
            other = "fully_shard" if isinstance(module, FSDPModule) else "DistributedDataParallel"
            raise UnsupportedLayoutError(
                f"FullyShardedDataParallel (FSDP1) and {other} in one model are not supported; "
                "HYBRID_SHARD shards within groups of ranks and replicates across them"
            )
    flat = FlatParameters(model)
    inventory = take_inventory(model, include, exclude, buffers, flat.registered)
    return FSDP1Source(flat, inventory, shard_replicas=shard_replicas)
