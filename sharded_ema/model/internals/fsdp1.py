"""Where ``FullyShardedDataParallel`` (FSDP1) keeps the parameters of a model.

FSDP1 flattens the parameters of a unit into one 1-D tensor, in memory order and with padding
between and behind them, and gives each rank a piece of it, cut without regard to where parameters
end. What this relies on, checked on PyTorch 2.8 to 2.13:

- ``flat_param._local_shard`` is this rank's piece, whatever the modules show at the moment; before
  the first forward the flat parameter itself is.
- With ``use_orig_params=True`` the parameters that the optimizer trains are views of that piece,
  without elements on ranks that hold none of theirs; else the optimizer trains the flat parameter,
  and the modules have no parameters.
- Gathered copies outlive a forward without backward and are used by the next one. Nothing public
  frees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel, ShardingStrategy

from sharded_ema.errors import StateError, UnsupportedLayoutError
from sharded_ema.model.internals.members import Members, imported
from sharded_ema.model.layout import FlatRange, Shape, c_strides

SEEN = "PyTorch 2.8 to 2.13"

MODULE = Members("an FSDP1 module", SEEN, ("_handle",))
HANDLE = Members(
    "the handle of an FSDP1 module",
    SEEN,
    ("flat_param", "device", "_training_state", "uses_sharded_strategy"),
)
FLAT = Members(
    "the flat parameter of an FSDP1 module",
    SEEN,
    (
        "_param_infos", "_shared_param_infos", "_shard_param_infos", "_param_extensions",
        "_fqns", "_shapes", "_strides", "_params",
    ),
)  # fmt: skip
VIEW = Members("a tensor", SEEN, ("_base",))

# The names of strategies that shard within groups of ranks and replicate across them.
_HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
_NO_SHARD = ShardingStrategy.NO_SHARD
_COMMON = "torch.distributed.fsdp._common_utils"


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has taken a parameter into a flat one, or it is one."""
    return bool(imported(_COMMON, "_is_fsdp_flattened", SEEN)(parameter))


def flattened_names(module: nn.Module) -> list[str]:
    """Names of what a module has in the place of parameters that a flat one has taken over.

    With ``use_orig_params=False`` these are plain tensors, views of the flat parameter.
    """
    tensors = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    if tensors:
        VIEW.check(Tensor)
    return [name for name, value in tensors.items() if isinstance(value._base, FlatParameter)]


class Unit:
    """An FSDP1 module that has flattened parameters.

    Args:
        module: see above.
    """

    def __init__(self, module: Any) -> None:
        HANDLE.check(module._handle)
        FLAT.check(module._handle.flat_param)
        self._module = module
        self._states: Any = imported(_COMMON, "HandleTrainingState", SEEN)
        self.flat: Any = module._handle.flat_param
        #: Process groups over which this rank's shard is replicated.
        self.replicas = _groups(module, shards=module.sharding_strategy == _NO_SHARD)

    @property
    def shard(self) -> Tensor:
        """This rank's piece of the flat parameter, with padding (1-D)."""
        return getattr(self.flat, "_local_shard", self.flat)

    @property
    def compute_device(self) -> torch.device:
        """Where the unit is gathered; its shard may lie in host memory."""
        device: torch.device = self._module._handle.device
        return device

    @property
    def is_idle(self) -> bool:
        """Whether neither a forward or backward nor ``summon_full_params`` is under way."""
        return self._module._handle._training_state == self._states.IDLE

    @torch.no_grad()  # with gradients a unit in the middle of a forward may stay gathered
    def reshard(self) -> None:
        """Free gathered copies, so that the next forward gathers what the shards hold then.

        Raises:
            StateError: ``summon_full_params`` is under way.
        """
        handle = self._module._handle
        if handle._training_state == self._states.SUMMON_FULL_PARAMS:
            raise StateError(
                f"the parameters of an FSDP unit, among them {self.flat._fqns[0]}, are gathered by "
                "summon_full_params; leave it before using the average"
            )
        names = ("_full_param_padded", "_full_prec_full_param_padded")
        copies = [getattr(self.flat, name) for name in names if hasattr(self.flat, name)]
        # A forward that an exception ended has left its unit in the middle of it.
        if not self.is_idle or any(copy.untyped_storage().size() for copy in copies):
            reshard = imported("torch.distributed.fsdp._runtime_utils", "_reshard", SEEN)
            reshard(self._module, handle, handle.uses_sharded_strategy)
        for copy in copies:
            # With FSDP_USE_FULL_PREC_IN_EVAL there are two, of which FSDP1 frees one.
            copy.untyped_storage().resize_(0)


@dataclass(frozen=True, slots=True, eq=False)
class Flattened:
    """A parameter in the flat parameter of a unit.

    Attributes:
        unit: the unit that flattened it.
        tensor: what the optimizer trains, the original parameter or the flat one.
        shape: global shape.
        order: its dimensions from the outermost to the innermost in memory.
        offset: where this rank's elements begin in its shard.
        range: which elements of the parameter they are, counted in memory order.
    """

    unit: Unit
    tensor: Tensor
    shape: Shape
    order: tuple[int, ...]
    offset: int
    range: FlatRange

    @property
    def is_flat(self) -> bool:
        """Whether the optimizer trains the flat parameter."""
        return self.tensor is self.unit.flat

    def local(self) -> Tensor:
        """This rank's elements (1-D), a view of its shard."""
        return self.unit.shard.detach().narrow(0, self.offset, self.range.numel)

    def is_detached(self) -> bool:
        """Whether what the optimizer trains lies elsewhere than in the shard, for good."""
        if not self.range.numel or not self.unit.is_idle:
            return False
        held = self.unit.shard if self.is_flat else self.local()
        return self.tensor.data_ptr() != held.data_ptr()


class FlatParameters:
    """All units of a model.

    Args:
        model: the target.

    Attributes:
        ranks: global ranks that share them.
        groups: process groups that together lead to all of these.

    Raises:
        UnsupportedLayoutError: the units lie on different ranks, hold DTensors, or something else
            of their layout is not supported.
        FrameworkVersionError: this version of PyTorch keeps them otherwise.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
        for module in modules:
            MODULE.check(module)
        self.ranks = _ranks(modules)
        self.groups = _groups(modules[0], shards=True) if modules else ()
        self.units = [Unit(m) for m in modules if m._handle is not None]
        # By module and the name there, because no parameter need be left to go by.
        self._flattened: dict[int, dict[str, Flattened]] = {}
        for unit in self.units:
            self._add(unit)

    def _add(self, unit: Unit) -> None:
        flat = unit.flat
        for index, (attribute, module, _) in enumerate(flat._param_infos):
            name, shape = flat._fqns[index], tuple(flat._shapes[index])
            if flat._param_extensions[index] is not None:
                raise UnsupportedLayoutError(
                    f"parameter {name} is a DTensor in FullyShardedDataParallel (FSDP1), which is "
                    "not supported with tensor parallelism; use fully_shard"
                )
            info = flat._shard_param_infos[index]
            start, count = (
                (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
            )
            self._flattened.setdefault(id(module), {})[attribute] = Flattened(
                unit,
                flat if flat._params is None else flat._params[index],
                shape,
                _memory_order(name, shape, flat._strides[index]),
                info.offset_in_shard or 0,
                FlatRange(start, start + count),
            )
        for tied in flat._shared_param_infos:
            first = self._flattened[id(tied.prim_module)][tied.prim_param_name]
            self._flattened.setdefault(id(tied.module), {})[tied.param_name] = first

    def of(self, module: nn.Module) -> dict[str, Flattened]:
        """The flattened parameters of one module itself, by their names there."""
        return self._flattened.get(id(module), {})


def has_flattened(model: nn.Module) -> bool:
    """Whether FSDP1 has taken over parameters of ``model``, or a module above has."""
    return any(map(is_flattened, model.parameters())) or any(
        isinstance(module, FullyShardedDataParallel) or flattened_names(module)
        for module in model.modules()
    )


def _memory_order(name: str, shape: Shape, strides: Sequence[int]) -> tuple[int, ...]:
    """Dimensions from the outermost to the innermost, as FSDP1 flattens a parameter."""
    order = tuple(sorted(range(len(shape)), key=lambda dim: -strides[dim]))
    dense = c_strides([shape[dim] for dim in order])
    if any(shape[d] > 1 and strides[d] != step for d, step in zip(order, dense, strict=True)):
        raise UnsupportedLayoutError(
            f"parameter {name} has shape {shape} and strides {tuple(strides)}, with holes or "
            "overlaps in memory, which FullyShardedDataParallel flattens wrongly; make it "
            "contiguous before wrapping"
        )
    return order


def _groups(module: Any, *, shards: bool) -> tuple[dist.ProcessGroup, ...]:
    """Process groups that lead to a unit's replicas, and with ``shards`` to its shards."""
    groups = [module._inter_node_pg] if _is_hybrid(module) else []
    if shards:
        groups.append(module.process_group)
    return tuple(group for group in groups if dist.get_world_size(group) > 1)


def _is_hybrid(module: Any) -> bool:
    return module.sharding_strategy.name in _HYBRID


def _ranks(modules: Sequence[Any]) -> list[int]:
    """Global ranks that share the units."""
    found = [_ranks_of(module) for module in modules]
    for module, ranks in zip(modules, found, strict=True):
        if ranks != found[0]:
            raise UnsupportedLayoutError(
                "units of FullyShardedDataParallel lie on different ranks: that of a "
                f"{type(modules[0].module).__name__} on {found[0]}, that of a "
                f"{type(module.module).__name__} on {ranks}; wrap all of a model with the same "
                "process groups or device_mesh"
            )
    return found[0] if found else []


def _ranks_of(module: Any) -> list[int]:
    own = dist.get_process_group_ranks(module.process_group)
    across = vars(module).get("_inter_node_pg")
    if across is None:
        return sorted(own)
    if not _is_hybrid(module):
        raise UnsupportedLayoutError(
            "HYBRID_SHARD over shard groups of one rank: FullyShardedDataParallel makes NO_SHARD "
            "of it and averages no gradients over the replicas; use NO_SHARD over all ranks"
        )
    mesh = vars(module).get("_device_mesh")
    if mesh is not None:
        return sorted(mesh.mesh.flatten().tolist())
    size = len(own) * dist.get_world_size(across)
    if size != dist.get_world_size():
        raise UnsupportedLayoutError(
            f"HYBRID_SHARD over {size} of {dist.get_world_size()} ranks, given as process groups, "
            "does not tell which ranks these are; pass device_mesh instead"
        )
    return list(range(size))
