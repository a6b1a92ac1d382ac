"""Parameters that are DTensors: FSDP2 and HSDP, tensor and expert parallelism, and combinations.

A DTensor says itself which block of the global tensor its local tensor is, and over which axes of
its mesh that block is replicated; nothing here depends on who made it.

What this relies on, checked on PyTorch 2.8 to 2.13: the sharded ``nn.Parameter`` objects of
``fully_shard`` stay the same for the life of the model, and so does the memory of their local
tensors, which is contiguous. They are registered on the modules only while these are resharded;
after a forward without backward the root's plain, gathered parameters stand in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.dlpack import from_dlpack

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.inventory import Inventory, Named, read
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import FlatShard
from sharded_ema.model.sources.meshes import Meshes
from sharded_ema.model.sources.replicas import Place, ReplicatedSource, leads, whole_copy

_PLACEMENTS = (ShardPlacement, _StridedShard, Replicate)


class FSDP2Source(ReplicatedSource):
    """Each rank averages the local tensors of its DTensors, or slices of what is replicated.

    Args:
        model: the module whose parameters are DTensors, settled.
        inventory: its tensors.
        shard_replicas: see :class:`ReplicatedSource`.

    Raises:
        UnsupportedLayoutError: a parameter has another placement than ``Shard`` and ``Replicate``,
            its local tensor is no plain tensor, or its mesh has nothing to do with the others.
    """

    kind = "fsdp2"

    def __init__(self, model: nn.Module, inventory: Inventory, *, shard_replicas: bool) -> None:
        self._model = model
        everything = (*inventory.averaged, *inventory.frozen, *inventory.buffers)
        self._dtensors = [n for n in everything if isinstance(n.tensor, DTensor)]
        for named in self._dtensors:
            _refuse_unsupported(named)
        self._meshes = Meshes(n.tensor.device_mesh for n in self._dtensors)  # type: ignore[attr-defined]
        super().__init__(
            inventory,
            self._meshes.ranks,
            [self._place(named) for named in inventory.averaged],
            shard_replicas=shard_replicas,
        )
        # Parameter objects stay; only averaged buffers must be looked up every time.
        self._fixed = all(isinstance(n.tensor, nn.Parameter) for n in inventory.averaged)
        self._held = [(n.tensor, isinstance(n.tensor, DTensor)) for n in inventory.averaged]

    def _place(self, named: Named) -> Place:
        groups = self._meshes.replicas(named.fqn, named.tensor)
        if isinstance(named.tensor, DTensor):
            return Place(_box(named.tensor), groups, writes=leads(groups))
        return whole_copy(named, groups)

    def settle(self) -> None:
        reshard(self._model)

    def target_tensor(self, index: int) -> Tensor:
        return local(self.inventory.averaged[index])

    def averaged_tensors(self) -> list[Tensor]:
        if self._fixed:
            return [t._local_tensor if sharded else t for t, sharded in self._held]  # type: ignore[attr-defined]
        return super().averaged_tensors()

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            _like(shard.name.tensor, tensor)
            if isinstance(shard.name.tensor, DTensor) and not place.groups
            else self.piece(shard, tensor)
            for shard, place, tensor in zip(self.shards, self.places, tensors, strict=True)
        ]

    def extra_value(self, named: Named) -> Tensor:
        tensor = read(named)
        if not isinstance(tensor, DTensor):
            return super().extra_value(named)
        box, block = _box(tensor), tensor._local_tensor.detach()
        return FlatShard(
            tensor.shape,
            [(box, block)] if box.numel else [],
            dtype=block.dtype,
            device=block.device,
            writes=leads(self._meshes.replicas(named.fqn, tensor)),
            reads=False,
        )

    def self_check(self) -> None:
        for named in self._dtensors:
            tensor = read(named)
            if isinstance(tensor, DTensor) and tensor._local_tensor.shape != _box(tensor).sizes:
                raise UnsupportedLayoutError(
                    f"parameter {named.fqn} has a local tensor of shape "
                    f"{tuple(tensor._local_tensor.shape)} on rank {dist.get_rank()}, where its "
                    f"placements {tensor.placements} say {_box(tensor).sizes}: PyTorch computes "
                    "wrong offsets for this combination of sizes; choose sizes that the "
                    "tensor-parallel axis divides"
                )

    def loose(self) -> dict[str, tuple[Box, Tensor]]:
        """What no DTensor says is replicated, but lies on several ranks alike."""
        found = {}
        for named in self.inventory.parameters:
            tensor = named.tensor
            if not isinstance(tensor, DTensor):
                found[named.fqn] = (Box.whole(named.shape), tensor)
            elif self._meshes.others(named.fqn, tensor.device_mesh):
                found[named.fqn] = (_box(tensor), tensor._local_tensor)
        return found


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that the sharded ones are registered and are what counts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _leave_forward(module._get_fsdp_state())
            module.reshard()


def _leave_forward(state: Any) -> None:
    """Give up a forward that an exception ended; else ``reshard()`` would wait for its end.

    What it has gathered, also ahead of its use, would serve later forwards with weights that are
    no longer those of the shards. PyTorch leaves clearing up to the user (``reset_iter_state``).
    """
    if all(group._training_state != TrainingState.FORWARD for group in _groups(state)):
        return
    (root,) = (each for each in state._state_ctx.all_states if each._is_root)
    if hasattr(root, "_reset_iter_state"):
        root._reset_iter_state()
        return
    for each in root._state_ctx.all_states:  # what that does, for older PyTorch
        each._training_state = TrainingState.IDLE
        for group in _groups(each):
            group._training_state = TrainingState.IDLE
            group.wait_for_unshard()  # so that it can be freed
            group._post_forward_indices.clear()
    root._comm_ctx.all_gather_state = None
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None


def _groups(state: Any) -> list[Any]:
    """The parameter groups of a ``fully_shard`` call, of which older PyTorch has at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def local(named: Named) -> Tensor:
    """This rank's tensor. ``to_local()`` would cost a dispatch and a view per parameter."""
    tensor = read(named)
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _like(parameter: DTensor, tensor: Tensor) -> DTensor:
    """A shadow as a DTensor with the layout of its parameter."""
    return DTensor.from_local(
        _own_storage(tensor),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        # Without shape and stride an uneven shard would be taken for an even one.
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _own_storage(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that begins at the start of its storage.

    PyTorch's asynchronous stager takes a DTensor for one with data of its own if the local tensor
    has a storage offset, as views of a flat buffer have, and fails (seen in 2.13).
    """
    return from_dlpack(tensor) if tensor.storage_offset() and tensor.numel() else tensor


def _box(tensor: DTensor) -> Box:
    (chunk,) = tensor.__create_chunk_list__()
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _refuse_unsupported(named: Named) -> None:
    tensor = named.tensor
    assert isinstance(tensor, DTensor)
    if not all(type(placement) in _PLACEMENTS for placement in tensor.placements):
        raise UnsupportedLayoutError(
            f"parameter {named.fqn} is a DTensor with placements {tensor.placements}; only Shard "
            "and Replicate have a part of the tensor on each rank that can be averaged"
        )
    kind = type(tensor._local_tensor)
    if kind not in (Tensor, nn.Parameter):
        raise UnsupportedLayoutError(
            f"the local tensor of parameter {named.fqn} is a {kind.__name__}; "
            "only plain tensors can be averaged. Convert the model after making its average"
        )
