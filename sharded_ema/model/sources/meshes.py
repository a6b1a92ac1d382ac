"""Which ranks share a model that lies on device meshes, and which of them hold equal copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import combinations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.internals.pytorch import root_mesh
from sharded_ema.model.sources.replicas import Groups

Ranks = frozenset[int]


class Meshes:
    """The device meshes of a model.

    Meshes that are slices of one root mesh name its axes. Along the axes that some parameter uses
    lie the ranks of this *stage*: all of them hold the same tensors, and a parameter that uses
    fewer axes is replicated over the others, as a norm that is sharded over the data-parallel axis
    alone while the layers beside it use the tensor-parallel axis as well. Along an axis of the root
    that no parameter uses lie ranks that hold other tensors (stages of a pipeline) or the same
    ones; which, they find out when they meet.

    Args:
        meshes: of all DTensors.

    Attributes:
        ranks: global ranks of the model, ascending.
        stage: those of them along the axes in use.

    Raises:
        UnsupportedLayoutError: this rank is in one of the meshes and not in another.
    """

    def __init__(self, meshes: Iterable[DeviceMesh]) -> None:
        self._meshes = list(dict.fromkeys(meshes))
        for mesh in self._meshes:
            if mesh.get_coordinate() is None:
                raise UnsupportedLayoutError(
                    f"rank {dist.get_rank()} is not in the device mesh {mesh} of some parameters; "
                    "make a ShardedEMA of the part of the model that this rank trains"
                )
        roots = list(dict.fromkeys(map(root_mesh, self._meshes)))
        stage: Ranks = frozenset().union(*(_along(m, range(m.ndim)) for m in self._meshes))
        everyone = stage
        if len(roots) == 1 and roots[0].get_coordinate() is not None:
            stage = _along(roots[0], self._used_axes(roots[0]))
            everyone = frozenset(roots[0].mesh.flatten().tolist())
        self.ranks, self.stage = sorted(everyone), sorted(stage)
        self._stage = stage
        self._others: dict[DeviceMesh | None, Groups] = {}

    def _used_axes(self, root: DeviceMesh) -> set[int]:
        """The axes of a root mesh along which the ranks of its slices lie."""
        used: set[int] = set()
        for mesh in self._meshes:
            own = _along(mesh, range(mesh.ndim))
            used.update(next((axes for axes in _subsets(root) if _along(root, axes) == own), ()))
        return used

    def replicas(self, name: str, tensor: Tensor) -> Groups:
        """Process groups over which this rank's tensor of a parameter is replicated in its stage.

        Raises:
            UnsupportedLayoutError: see :meth:`others`.
        """
        if not isinstance(tensor, DTensor):
            return self.others(name, None)
        mesh = tensor.device_mesh
        axes = [axis for axis, p in enumerate(tensor.placements) if p.is_replicate()]
        return (*self.others(name, mesh), *_groups(name, mesh, axes))

    def others(self, name: str, mesh: DeviceMesh | None) -> Groups:
        """Process groups that lead from the ranks of a mesh to the other ranks of the stage.

        They are axes of another mesh, of which ``mesh`` is a part. Nothing is communicated.

        Args:
            name: parameter that lies on the mesh.
            mesh: one of the meshes, or ``None`` for this rank alone.

        Raises:
            UnsupportedLayoutError: there are none, or their ranks are out of order.
        """
        if mesh not in self._others:
            self._others[mesh] = self._lead(name, mesh)
        return self._others[mesh]

    def _lead(self, name: str, mesh: DeviceMesh | None) -> Groups:
        own = frozenset([dist.get_rank()]) if mesh is None else _along(mesh, range(mesh.ndim))
        if own == self._stage:
            return ()
        # Slices of one mesh know it as their root, even if no parameter lies on all of it.
        roots = map(root_mesh, self._meshes)
        for whole in dict.fromkeys((*self._meshes, *roots)):
            if whole.get_coordinate() is None:
                continue
            for axes in _subsets(whole):
                if _along(whole, axes) == self._stage:
                    for inner in _subsets(whole):
                        if set(inner) <= set(axes) and _along(whole, inner) == own:
                            return _groups(name, whole, sorted(set(axes) - set(inner)))
        raise UnsupportedLayoutError(
            f"parameter {name} lies on a device mesh of the ranks {sorted(own)} alone, of the "
            f"{len(self._stage)} ranks of the model, and it is no slice of a mesh over all of "
            "them. Make one mesh over all ranks and slice the others from it: "
            'init_device_mesh(..., mesh_dim_names=("dp", "ep"))["dp"]. Experts that each rank has '
            "for itself must be DTensors on such a mesh, or be left out with exclude="
        )


def _subsets(mesh: DeviceMesh) -> Iterator[tuple[int, ...]]:
    """All choices of axes, fewest first; an axis of size 1 leads nowhere."""
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    for count in range(len(axes) + 1):
        yield from combinations(axes, count)


def _along(mesh: DeviceMesh, axes: Collection[int]) -> Ranks:
    """The ranks of a mesh whose coordinates differ from this rank's along ``axes`` only."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    index = tuple(slice(None) if a in axes else c for a, c in enumerate(coordinate))
    return frozenset(mesh.mesh[index].flatten().tolist())


def _groups(name: str, mesh: DeviceMesh, axes: Iterable[int]) -> Groups:
    axes = [axis for axis in axes if mesh.size(axis) > 1]
    for axis in axes:
        # Process groups count their ranks in ascending order.
        if (mesh.mesh.diff(dim=axis) < 0).any():
            raise UnsupportedLayoutError(
                f"parameter {name} is replicated over axis {axis} of the device mesh {mesh}, along "
                "which the ranks do not ascend; make the mesh with init_device_mesh"
            )
    return tuple(mesh.get_group(axis) for axis in axes)
