"""Parameters that are DTensors: FSDP2 and HSDP, tensor and expert parallelism, and combinations.

A DTensor says itself which block of the global tensor its local tensor is, and over which axes of
its mesh that block is replicated; nothing here depends on who made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.utils.dlpack import from_dlpack

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.internals import fsdp2
from sharded_ema.model.internals.pytorch import (
    DTENSOR,
    box_of,
    local_tensor,
    placed_like,
    strided_shard,
)
from sharded_ema.model.inventory import (
    Inventory,
    Named,
    Selection,
    refuse_partitioned,
    take_inventory,
)
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import FlatShard, whole
from sharded_ema.model.sources.meshes import Meshes
from sharded_ema.model.sources.protocol import Copy, FollowsOptimizers, InPlace, Source
from sharded_ema.model.sources.replicas import Place, Shares, leads, stored_shard, whole_copy


class FSDP2Shards:
    """Each rank averages the local tensors of its DTensors, or slices of what is replicated.

    Args:
        model: the module whose parameters are DTensors, settled.
        inventory: its tensors.
        shard_replicas: see :class:`Shares`.

    Raises:
        UnsupportedLayoutError: a parameter has another placement than ``Shard`` and ``Replicate``,
            its local tensor neither is nor holds a plain tensor, or its mesh has nothing to do
            with the others.
    """

    kind = "fsdp2"
    is_pipeline = False

    def __init__(self, model: nn.Module, inventory: Inventory, *, shard_replicas: bool) -> None:
        self._model = model
        self.inventory = inventory
        everything = (*inventory.averaged, *inventory.frozen, *inventory.buffers)
        self._dtensors = [n for n in everything if isinstance(n.tensor, DTensor)]
        frozen = {id(named) for named in inventory.frozen}
        for named in self._dtensors:
            # Whether frozen ones have to be stored is not known here.
            _refuse_unsupported(named, of_any_kind=id(named) in frozen)
        self._meshes = Meshes(n.tensor.device_mesh for n in self._dtensors)  # type: ignore[attr-defined]
        self.ranks, self.stage = self._meshes.ranks, self._meshes.stage
        # Parameter objects stay; only averaged buffers must be looked up every time.
        self._fixed = all(named.is_parameter for named in inventory.averaged)
        self._held = [(n.tensor, isinstance(n.tensor, DTensor)) for n in inventory.averaged]
        self._inside = [
            (i, _shard_inside(local_tensor(tensor)))
            for i, (tensor, sharded) in enumerate(self._held)
            if sharded and not _is_plain(local_tensor(tensor))
        ]
        self.shares = Shares(
            inventory,
            [self._place(named) for named in inventory.averaged],
            self.blocks(),
            shard_replicas=shard_replicas,
        )
        self.shards = self.shares.shards

    def _place(self, named: Named) -> Place:
        groups = self._meshes.replicas(named.fqn, named.tensor)
        if isinstance(named.tensor, DTensor):
            return Place(box_of(named.tensor), groups, writes=leads(groups))
        return whole_copy(named, groups)

    def settle(self) -> None:
        """Free what is gathered or being gathered."""
        fsdp2.settle(self._model)

    def blocks(self) -> list[Tensor]:
        """This rank's tensors."""
        if not self._fixed:
            return [_local(named.read()) for named in self.inventory.averaged]
        found = [local_tensor(t) if sharded else t for t, sharded in self._held]
        for i, name in self._inside:
            found[i] = getattr(found[i], name)
        return found

    def live(self) -> list[Tensor]:
        return self.shares.cut(self.blocks())

    def stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        places = self.shares.places
        return [
            placed_like(shard.name.tensor, _own_storage(tensor))
            # Stored as what it is, which leaves it to DCP who writes.
            if isinstance(shard.name.tensor, DTensor) and not place.groups
            else stored_shard(shard, tensor)
            for shard, place, tensor in zip(self.shards, places, tensors, strict=True)
        ]

    def stored_apart(self, named: Named) -> Tensor:
        tensor = named.read()
        if not isinstance(tensor, DTensor):
            groups = self._meshes.replicas(named.fqn, tensor)
            return whole(tensor.detach(), writes=leads(groups), reads=False)
        box, block = box_of(tensor), _local(tensor).detach()
        return FlatShard(
            tensor.shape,
            [(box, block)] if box.numel else [],
            dtype=block.dtype,
            device=block.device,
            writes=leads(self._meshes.replicas(named.fqn, tensor)),
            reads=False,
        )

    def copies(self) -> Mapping[str, Copy]:
        """What a DTensor says is replicated, and what lies on several ranks alike without that."""
        found = {}
        beyond = self.stage != self.ranks
        for named in self.inventory.readable:
            tensor = named.tensor
            groups = self._meshes.replicas(named.fqn, tensor)
            if not isinstance(tensor, DTensor):
                box = Box.whole(named.shape)
                found[named.fqn] = Copy(box, tensor, synchronised=False, over=groups)
            elif groups or beyond:
                loose = beyond or bool(self._meshes.others(named.fqn, tensor.device_mesh))
                found[named.fqn] = Copy(box_of(tensor), _local(tensor), not loose, over=groups)
        return found

    def self_check(self) -> None:
        for named in self._dtensors:
            tensor = named.read()
            if isinstance(tensor, DTensor) and local_tensor(tensor).shape != box_of(tensor).sizes:
                raise UnsupportedLayoutError(
                    f"parameter {named.fqn} has a local tensor of shape "
                    f"{tuple(local_tensor(tensor).shape)} on rank {dist.get_rank()}, where its "
                    f"placements {tensor.placements} say {box_of(tensor).sizes}: PyTorch computes "
                    "wrong offsets for this combination of sizes; choose sizes that the "
                    "tensor-parallel axis divides"
                )


def recognises(target: object) -> bool:
    """Whether a module has DTensors among its parameters; what is gathered of it is freed first."""
    if not isinstance(target, nn.Module):
        return False
    fsdp2.settle(target)
    return any(isinstance(parameter, DTensor) for parameter in target.parameters())


def make_source(target: nn.Module, selection: Selection, *, shard_replicas: bool) -> Source:
    """The source of a module with DTensors among its parameters."""
    inventory = take_inventory(target, selection)
    refuse_partitioned(inventory)
    shards = FSDP2Shards(target, inventory, shard_replicas=shard_replicas)
    shares = shards.shares
    stand_in = InPlace(shards.blocks, shares.fill, settle=shards.settle, together=shares.together)
    return Source(shards, stand_in, FollowsOptimizers(inventory), fsdp2.compute_devices(target))


def _local(tensor: Tensor) -> Tensor:
    """This rank's elements as a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    block: Tensor = local_tensor(tensor)
    return block if _is_plain(block) else getattr(block, _shard_inside(block))


def _is_plain(local: Tensor) -> bool:
    return type(local) in (Tensor, nn.Parameter)


def _shard_inside(local: Tensor) -> str:
    """Where a local tensor that gathers convert holds its shard: it was asked before."""
    name = fsdp2.shard_inside(local)
    assert name is not None
    return name


def _own_storage(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that begins at the start of its storage.

    PyTorch's asynchronous stager takes a DTensor for one with data of its own if the local tensor
    has a storage offset, as views of a flat buffer have, and fails (seen in 2.13).
    """
    if not tensor.numel():
        return tensor.new_empty(tensor.shape)
    return from_dlpack(tensor) if tensor.storage_offset() else tensor


def _refuse_unsupported(named: Named, *, of_any_kind: bool) -> None:
    tensor = named.tensor
    assert isinstance(tensor, DTensor)
    DTENSOR.check(tensor)
    known = (ShardPlacement, strided_shard(), Replicate)
    if not all(type(placement) in known for placement in tensor.placements):
        raise UnsupportedLayoutError(
            f"parameter {named.fqn} is a DTensor with placements {tensor.placements}; only Shard "
            "and Replicate have a part of the tensor on each rank that can be averaged"
        )
    local = local_tensor(tensor)
    if _is_plain(local) or of_any_kind:
        return
    kind = type(local).__name__
    if not fsdp2.is_converted_by_gathers(local):
        raise UnsupportedLayoutError(
            f"the local tensor of parameter {named.fqn} is a {kind}; "
            "only plain tensors can be averaged. Convert the model after making its average"
        )
    if fsdp2.shard_inside(local) is None:
        raise UnsupportedLayoutError(
            f"the local tensor of parameter {named.fqn} is a {kind}, which fully_shard gathers "
            f"through its fsdp_pre_all_gather, and no one plain tensor of {tensor.dtype} in it is "
            "the shard that is trained; train in a dtype that the shards have, or exclude it"
        )
