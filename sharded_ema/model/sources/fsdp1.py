"""``FullyShardedDataParallel`` (FSDP1): each rank averages its shard of the flat parameters.

Neither padding nor frozen parameters between the trained ones are averaged. Units may be sharded,
replicated (``NO_SHARD``) or both (``HYBRID_SHARD``), even within one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.errors import BindError, StateError, UnsupportedLayoutError
from sharded_ema.model.internals.fsdp1 import (
    FlatParameters,
    Flattened,
    flattened_names,
    has_flattened,
    is_flattened,
)
from sharded_ema.model.inventory import (
    Found,
    Inventory,
    Named,
    Selection,
    parameters_of,
    take_inventory,
)
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import FlatShard, range_pieces, whole
from sharded_ema.model.sources.protocol import Copy, FollowsOptimizers, InPlace, Source
from sharded_ema.model.sources.replicas import Place, Shares, leads, whole_copy


class Names:
    """The parameters of a model by name, whether they are flattened or not.

    Args:
        flat: the flat parameters of the model.
    """

    def __init__(self, flat: FlatParameters) -> None:
        self._flat = flat

    def find(self, named: Named) -> Flattened | None:
        """A parameter where it lies; ``None`` for a buffer and for what FSDP1 ignores."""
        return self._flat.of(named.owner).get(named.attribute)

    def is_flattened(self, named: Named) -> bool:
        """Whether a unit has the parameter, and its module only at times."""
        return self.find(named) is not None

    def registered(self, named: Named) -> Tensor | None:
        """What the model has in the place of a parameter now."""
        found = self.find(named)
        # The modules of a unit that shows the flat parameter have none that could be compared.
        return found.tensor if found and found.is_flat else named.registered()

    def found_on(self, module: nn.Module) -> Iterator[Found]:
        """The parameters of one module itself.

        Raises:
            BindError: one belongs to a unit outside the target.
            UnsupportedLayoutError: one is a DTensor.
        """
        mine = self._flat.of(module)
        for attribute, found in mine.items():
            yield attribute, found, found.tensor, found.shape
        flat = {id(unit.flat) for unit in self._flat.units}
        for attribute in flattened_names(module):
            if attribute not in mine:
                raise _outside(attribute, module)
        for attribute, identity, tensor, shape in parameters_of(module):
            if attribute in mine or identity in flat:
                continue
            if is_flattened(tensor):
                raise _outside(attribute, module)
            if isinstance(tensor, DTensor):
                raise UnsupportedLayoutError(
                    f"parameter {attribute} of {type(module).__name__} is a DTensor beside "
                    "FullyShardedDataParallel (FSDP1); use fully_shard for all of the model"
                )
            yield attribute, identity, tensor, shape


def _outside(attribute: str, module: nn.Module) -> BindError:
    return BindError(
        f"parameter {attribute} of {type(module).__name__} belongs to a FullyShardedDataParallel "
        "module outside the target; pass the outermost one"
    )


class FSDP1Shards:
    """Each rank averages its elements of the flat parameters, or slices of what is replicated.

    Args:
        flat: the flat parameters of the model.
        names: the same by name.
        inventory: the tensors of the model.
        shard_replicas: see :class:`Shares`.
    """

    kind = "fsdp1"
    is_pipeline = False

    def __init__(
        self, flat: FlatParameters, names: Names, inventory: Inventory, *, shard_replicas: bool
    ) -> None:
        self._flat = flat
        self._names = names
        self.ranks = self.stage = flat.ranks
        self.inventory = inventory
        self._flattened = [names.find(named) for named in inventory.averaged]
        self.shares = Shares(
            inventory,
            [self._place(named) for named in inventory.averaged],
            self.blocks(),
            shard_replicas=shard_replicas,
        )
        self.shards = self.shares.shards
        self._parameters = [named.tensor for named in inventory.averaged if named.is_parameter]
        self._buffers = [
            (i, named) for i, named in enumerate(inventory.averaged) if not named.is_parameter
        ]
        self._seen: list[int] = []
        self._held: list[Tensor] = []

    def _place(self, named: Named) -> Place:
        found = self._names.find(named)
        if found is None:
            return whole_copy(named, self._flat.groups)
        groups = found.unit.replicas
        return Place(Box.whole(named.shape), groups, leads(groups), found.range, found.order)

    def settle(self) -> None:
        """Free gathered parameters."""
        for unit in self._flat.units:
            unit.reshard()

    def blocks(self) -> list[Tensor]:
        """This rank's elements of every averaged tensor."""
        pairs = zip(self.inventory.averaged, self._flattened, strict=True)
        return [named.read() if found is None else found.local() for named, found in pairs]

    def live(self) -> list[Tensor]:
        pointers = [unit.shard.data_ptr() for unit in self._flat.units]
        pointers += map(Tensor.data_ptr, self._parameters)
        if pointers != self._seen:
            self._refuse_detached()
            self._held, self._seen = self.blocks(), pointers
        blocks = list(self._held)
        for i, named in self._buffers:  # which modules replace freely
            blocks[i] = named.read()
        return self.shares.cut(blocks)

    def _refuse_detached(self) -> None:
        """Refuse parameters that have left the shard, which then is not what is trained."""
        for named, found in zip(self.inventory.averaged, self._flattened, strict=True):
            if found is not None and found.is_detached():
                raise StateError(
                    f"parameter {named.fqn} no longer lies in its FSDP unit's shard: something "
                    "assigned param.data, or model.to() came after the first forward. Change "
                    "parameters in place, and move the model before it is first used"
                )

    def stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.shares.stored(tensors)

    def stored_apart(self, named: Named) -> Tensor:
        found = self._names.find(named)
        if found is None:
            writes = dist.get_rank() == self.stage[0]
            return whole(named.read().detach(), writes=writes, reads=False)
        local = found.local()
        return FlatShard(
            named.shape,
            range_pieces(Box.whole(named.shape), found.range, local, found.order),
            dtype=local.dtype,
            device=local.device,
            writes=leads(found.unit.replicas),
            reads=False,
        )

    def copies(self) -> Mapping[str, Copy]:
        """Plain parameters, and what FSDP1 keeps equal but does not make so."""
        copies = {}
        for named in self.inventory.readable:
            found = self._names.find(named)
            if found is None:
                copies[named.fqn] = Copy(Box.whole(named.shape), named.tensor, synchronised=False)
            elif found.unit.replicas:
                elements = Box((found.range.start,), (found.range.numel,))
                replicas = found.unit.replicas
                copies[named.fqn] = Copy(elements, found.local(), synchronised=True, over=replicas)
        return copies

    def self_check(self) -> None:
        pass  # a parameter is held once


def recognises(target: object) -> bool:
    """Whether FSDP1 has taken over parameters of a module."""
    return isinstance(target, nn.Module) and has_flattened(target)


def make_source(target: nn.Module, selection: Selection, *, shard_replicas: bool) -> Source:
    """The source of such a module.

    Raises:
        UnsupportedLayoutError: something of its layout is not supported; the message names it.
        BindError: a parameter cannot be averaged.
    """
    for module in target.modules():
        if isinstance(module, (DistributedDataParallel, FSDPModule)):
            other = "fully_shard" if isinstance(module, FSDPModule) else "DistributedDataParallel"
            raise UnsupportedLayoutError(
                f"FullyShardedDataParallel (FSDP1) and {other} in one model are not supported; "
                "HYBRID_SHARD shards within groups of ranks and replicates across them"
            )
    flat = FlatParameters(target)
    names = Names(flat)
    inventory = take_inventory(target, selection, names.found_on)
    inventory.registered = names.registered
    inventory.is_flattened = names.is_flattened
    shards = FSDP1Shards(flat, names, inventory, shard_replicas=shard_replicas)
    shares = shards.shares
    stand_in = InPlace(shards.blocks, shares.fill, settle=shards.settle, together=shares.together)
    devices = frozenset(unit.compute_device for unit in flat.units)
    return Source(shards, stand_in, FollowsOptimizers(inventory), devices)
