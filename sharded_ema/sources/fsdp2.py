"""``fully_shard`` (FSDP2) on a 1-D mesh: parameters are DTensors, each rank averages its shard.

What this relies on, checked on PyTorch 2.13: the sharded ``nn.Parameter`` objects stay the same
for the life of the model, and so does the memory of their local tensors. They are registered on
the modules only while these are resharded; after a forward without backward the root's plain,
gathered parameters stand in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.utils.dlpack import from_dlpack

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.layout import Box
from sharded_ema.sources.base import (
    Inventory,
    Named,
    Shard,
    ShardSource,
    copy_into,
    digest,
    read,
)
from sharded_ema.values import FlatShard, whole


class FSDP2Source(ShardSource):
    """Each rank averages the local tensors of its DTensors, and plain parameters whole.

    Args:
        model: the module that ``fully_shard`` was applied to, settled.
        inventory: its tensors.

    Raises:
        UnsupportedLayoutError: a parameter's mesh has more than one axis, is another one than the
            first parameter's, or its placement is not ``Shard``.
    """

    kind = "fsdp2"

    def __init__(self, model: nn.Module, inventory: Inventory) -> None:
        self.inventory = inventory
        self._model = model
        dtensors = [n for n in (*inventory.averaged, *inventory.frozen) if _is_dtensor(n)]
        for named in dtensors:
            _refuse_unsupported(named, dtensors[0])
        mesh = dtensors[0].tensor.device_mesh  # type: ignore[attr-defined]
        self.ranks = mesh.mesh.flatten().tolist()
        self.shards = [self._shard(named) for named in inventory.averaged]
        # The usual case has nothing but DTensors, and a short way to their local tensors.
        self._tensors = [n.tensor for n in inventory.averaged]
        self._fixed = all(map(_is_dtensor, inventory.averaged))

    def _shard(self, named: Named) -> Shard:
        shape = tuple(named.tensor.shape)
        if _is_dtensor(named):
            return Shard(named, shape, _box(named))
        return Shard(named, shape, Box.whole(shape), writes=self.is_first_rank)

    def settle(self) -> None:
        reshard(self._model)

    def live(self) -> list[Tensor]:
        if self._fixed:
            return [tensor._local_tensor for tensor in self._tensors]  # type: ignore[attr-defined]
        return [local(shard.name) for shard in self.shards]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        out: list[Tensor] = []
        for shard, tensor in zip(self.shards, tensors, strict=True):
            parameter = shard.name.tensor
            if isinstance(parameter, DTensor):
                # Without shape and stride an uneven shard would be taken for an even one.
                out.append(
                    DTensor.from_local(
                        _own_storage(tensor),
                        parameter.device_mesh,
                        parameter.placements,
                        run_check=False,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    )
                )
            else:
                out.append(whole(tensor, writes=self.is_first_rank))
        return out

    def extra_value(self, named: Named) -> Tensor:
        if not _is_dtensor(named):
            return super().extra_value(named)
        tensor, box = local(named).detach(), _box(named)
        return FlatShard(
            named.tensor.shape,
            [(box, tensor)] if box.numel else [],
            dtype=tensor.dtype,
            device=tensor.device,
            reads=False,
        )

    def swap_targets(self) -> list[Tensor]:
        return self.live()

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        copy_into(self.swap_targets(), tensors)

    def agreement_record(self) -> dict[str, str]:
        named = (*self.inventory.averaged, *self.inventory.frozen)
        return {
            n.fqn: digest(n.tensor)
            for n in named
            if isinstance(n.tensor, nn.Parameter) and not _is_dtensor(n)
        }


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that the sharded ones are registered and are what counts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(named: Named) -> Tensor:
    """This rank's tensor. ``to_local()`` would cost a dispatch and a view per parameter."""
    parameter = named.tensor
    return parameter._local_tensor if isinstance(parameter, DTensor) else read(named)


def _own_storage(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that begins at the start of its storage.

    PyTorch's asynchronous stager takes a DTensor for one with data of its own if the local tensor
    has a storage offset, as views of a flat buffer have, and fails (seen in 2.13).
    """
    return from_dlpack(tensor) if tensor.storage_offset() and tensor.numel() else tensor


def _is_dtensor(named: Named) -> bool:
    return isinstance(named.tensor, DTensor)


def _box(named: Named) -> Box:
    (chunk,) = named.tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _refuse_unsupported(named: Named, first: Named) -> None:
    parameter, reference = named.tensor, first.tensor
    assert isinstance(parameter, DTensor) and isinstance(reference, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    supported = "this version supports fully_shard on a 1-D mesh, DDP and unsharded modules"
    if mesh.ndim != 1 or not all(type(p) is ShardPlacement for p in placements):
        raise UnsupportedLayoutError(
            f"parameter {named.fqn} is a DTensor with placements {placements} on a {mesh.ndim}-D "
            f"mesh; {supported} (no HSDP, tensor or expert parallelism yet)"
        )
    if mesh != reference.device_mesh:
        raise UnsupportedLayoutError(
            f"parameters {first.fqn} and {named.fqn} lie on different device meshes; {supported}"
        )
