"""``FullyShardedDataParallel`` (FSDP1): each rank averages its shard of the flat parameters.

Padding is never averaged, and frozen parameters, which may lie between trained ones, are not either.
Units may be sharded, replicated (``NO_SHARD``) or both (``HYBRID_SHARD``), even within one model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.errors import StateError, UnsupportedLayoutError
from sharded_ema.layout import Box, FlatRange
from sharded_ema.sources.base import (
    Inventory,
    Named,
    Shard,
    ShardSource,
    digest,
    read,
    take_inventory,
)
from sharded_ema.sources.flat_parameters import FlatParameters, Place
from sharded_ema.sources.replicas import Groups, Replicas
from sharded_ema.values import whole


class FSDP1Source(ShardSource):
    """Each rank averages its elements of the flat parameters, and plain parameters whole.

    Args:
        flat: the flat parameters of the model.
        inventory: the tensors of the model.
        shard_replicas: keep a slice of a replicated shard on each replica; ``False`` keeps all of
            it on each, so that a swap needs no communication.
    """

    kind = "fsdp1"

    def __init__(self, flat: FlatParameters, inventory: Inventory, *, shard_replicas: bool) -> None:
        self.inventory = inventory
        self.ranks = flat.ranks
        self._flat = flat
        self._places = [flat.place(named) for named in inventory.averaged]
        targets = self.swap_targets()
        alike: dict[Groups, list[int]] = {}
        for i, place in enumerate(self._places):
            groups = place.unit.replicas if place and shard_replicas else ()
            alike.setdefault(groups, []).append(i)
        self._replicas = [
            (members, Replicas(groups, [targets[i] for i in members]))
            for groups, members in alike.items()
        ]
        self.swap_is_collective = any(replicas.size > 1 for _, replicas in self._replicas)
        #: Of each swap target the elements that this rank averages.
        self._spans = [FlatRange(0, 0)] * len(targets)
        for members, replicas in self._replicas:
            for i, span in zip(members, replicas.spans, strict=True):
                self._spans[i] = span
        self.shards = [
            self._shard(named, place, span, divided=shard_replicas)
            for named, place, span in zip(
                inventory.averaged, self._places, self._spans, strict=True
            )
        ]
        self._pointers: list[int] = []
        self._views: list[Tensor | None] = []

    def _shard(self, named: Named, place: Place | None, span: FlatRange, *, divided: bool) -> Shard:
        box = Box.whole(named.shape)
        if place is None:
            return Shard(named, named.shape, box, writes=self.is_first_rank)
        start = place.range.start
        return Shard(
            named,
            named.shape,
            box,
            FlatRange(start + span.start, start + span.stop),
            place.order,
            writes=divided or place.unit.is_first_replica,
        )

    def live(self) -> list[Tensor]:
        pointers = [unit.shard.data_ptr() for unit in self._flat.units]
        pointers += [place.tensor.data_ptr() for place in self._places if place]
        if pointers != self._pointers:
            self._refuse_detached()
            self._views = [
                place.local()[span.start : span.stop] if place else None
                for place, span in zip(self._places, self._spans, strict=True)
            ]
            self._pointers = pointers
        return [
            read(shard.name) if view is None else view
            for shard, view in zip(self.shards, self._views, strict=True)
        ]

    def _refuse_detached(self) -> None:
        """Refuse parameters that have left the shard, which is not what is trained then."""
        for named, place in zip(self.inventory.averaged, self._places, strict=True):
            if (
                place is not None
                and place.range.numel
                and place.unit.is_idle
                and not place.is_trained()
            ):
                raise StateError(
                    f"parameter {named.fqn} no longer lies in its FSDP unit's shard: something "
                    "assigned param.data, or model.to() came after the first forward. Change "
                    "parameters in place, and move the model before it is first used"
                )

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            whole(tensor, writes=shard.writes)
            if place is None or shard.range is None
            else place.value(tensor, shard.range, writes=shard.writes)
            for shard, place, tensor in zip(self.shards, self._places, tensors, strict=True)
        ]

    def extra_value(self, named: Named) -> Tensor:
        place = self._flat.place(named)
        if place is None:
            return super().extra_value(named)
        return place.value(
            place.local(), place.range, writes=place.unit.is_first_replica, reads=False
        )

    def swap_targets(self) -> list[Tensor]:
        return [
            place.local() if place else read(named)
            for place, named in zip(self._places, self.inventory.averaged, strict=True)
        ]

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        targets = self.swap_targets()
        for members, replicas in self._replicas:
            replicas.gather([targets[i] for i in members], [tensors[i] for i in members])

    def settle(self) -> None:
        for unit in self._flat.units:
            unit.reshard()

    def registered(self, named: Named) -> Tensor | None:
        place = self._flat.place(named)
        if place is not None and place.tensor is place.unit.flat:
            return place.tensor  # the modules have no parameter to compare with
        return super().registered(named)

    def agreement_record(self) -> dict[str, str]:
        record = {}
        for named in (*self.inventory.averaged, *self.inventory.frozen):
            place = self._flat.place(named)
            if place is None and isinstance(named.tensor, nn.Parameter):
                record[named.fqn] = digest(named.tensor)
            elif place is not None and place.unit.replicas:
                # FSDP1 keeps replicas equal, but does not make them so.
                record[named.fqn] = digest(place.local())
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
            other = (
                "DistributedDataParallel" if not isinstance(module, FSDPModule) else "fully_shard"
            )
            raise UnsupportedLayoutError(
                f"FullyShardedDataParallel (FSDP1) and {other} in one model are not supported; "
                "HYBRID_SHARD shards within groups of ranks and replicates across them"
            )
    flat = FlatParameters(model)
    inventory = take_inventory(model, include, exclude, buffers, flat.registered)
    return FSDP1Source(flat, inventory, shard_replicas=shard_replicas)
