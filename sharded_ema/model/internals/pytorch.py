"""PyTorch's own: modules, tensors, process groups, optimizers. Seen in PyTorch 2.8 to 2.13.

What is read in every training step is handed out as the framework's own attribute getters, since a
Python call for each of a thousand parameters would be felt.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sharded_ema.model.internals.members import Members, imported
from sharded_ema.model.layout import Box

SEEN = "PyTorch 2.8 to 2.13"

# ---------------------------------------------------------------------- modules

MODULE = Members(
    "a module",
    SEEN,
    (
        "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
        "_state_dict_hooks", "_save_to_state_dict", "_version",
    ),
)  # fmt: skip


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters registered on a module itself, by their names there."""
    return module._parameters


_parameters_of = attrgetter("_parameters")


def registered_parameters(
    modules: Iterable[nn.Module], names: Iterable[str]
) -> list[nn.Parameter | None]:
    """For each module what it has registered as a parameter under a name."""
    pairs = zip(map(_parameters_of, modules), names, strict=True)
    return [own.get(name) for own, name in pairs]


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers registered on a module itself."""
    return module._buffers


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules registered on a module itself."""
    return module._modules


VERSIONS = Members("torch.autograd", SEEN, ("_unsafe_preserve_version_counter",))


def unchanged(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Let autograd take tensors for unchanged after the block, which has put their values back.

    Within the block a backward through them is refused, as ever. What is only made in inference
    mode nobody differentiates.
    """
    VERSIONS.check(torch.autograd)
    counted = tuple(tensor for tensor in tensors if not tensor.is_inference())
    kept: AbstractContextManager[None] = torch.autograd._unsafe_preserve_version_counter(counted)
    return kept


#: Under which name ``torch.compile`` holds the module that it has compiled.
COMPILED = "_orig_mod"


def hooks_of(module: nn.Module) -> list[Any]:
    """Forward hooks of a module, those before and those after."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in what a forward takes or gives, however nested."""
    leaves = imported("torch.utils._pytree", "tree_leaves", SEEN)(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def is_of_a_plan(hook: Any) -> bool:
    """Whether a forward hook is one that a plan of tensor parallelism has registered."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor")


def copy_plan(module: nn.Module, copy: nn.Module) -> None:
    """Let a copy convert what goes into and comes out of it as a plan has it for the module.

    The hooks of a plan know their meshes and placements, and no module.
    """
    named = module._forward_pre_hooks_with_kwargs
    for key, hook in module._forward_pre_hooks.items():
        if is_of_a_plan(hook):
            copy.register_forward_pre_hook(hook, with_kwargs=key in named)
    for hook in module._forward_hooks.values():
        if is_of_a_plan(hook):
            copy.register_forward_hook(hook)


def is_persistent(module: nn.Module, name: str) -> bool:
    """Whether a buffer of the module is in its ``state_dict()``."""
    return name not in module._non_persistent_buffers_set


CALLS = Members("the class of modules", SEEN, ("_call_impl",))
AUTOGRAD = Members("torch._C", SEEN, ("_current_graph_task_id",))


def is_being_called(modules: Iterable[nn.Module]) -> bool:
    """Whether the code that asks was called by one of these modules, over however many others."""
    CALLS.check(nn.Module)
    code, wanted = nn.Module._call_impl.__code__, set(map(id, modules))
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is code and id(frame.f_locals.get("self")) in wanted:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_in_a_backward() -> bool:
    """Whether the code that asks was called by a backward, as hooks are."""
    AUTOGRAD.check(torch._C)
    return torch._C._current_graph_task_id() != -1


#: The last part of the key of what ``get_extra_state()`` returns.
EXTRA_STATE = "_extra_state"


def state_dict_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """What changes the state dict of a module and of those inside, but for wrappers' own hooks."""
    hooks = module._state_dict_hooks.values()
    return [h for h in hooks if not str(getattr(h, "__module__", "")).startswith(_WRAPPERS)]


_WRAPPERS = "torch.distributed."


def saves_itself(module: nn.Module) -> bool:
    """Whether a module puts its tensors into a state dict in a way of its own."""
    return type(module)._save_to_state_dict is not nn.Module._save_to_state_dict


def save_instead(
    module: nn.Module,
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor | None],
    state: dict[str, Any],
    prefix: str,
) -> None:
    """Let a module put other tensors into a state dict than its own, in their place."""
    own = module.__dict__
    before = own["_parameters"], own["_buffers"]
    own["_parameters"], own["_buffers"] = parameters, buffers
    try:
        module._save_to_state_dict(state, prefix, keep_vars=True)
    finally:
        own["_parameters"], own["_buffers"] = before


def has_extra_state(module: nn.Module) -> bool:
    """Whether the state dict of a module has what ``get_extra_state()`` returns."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def new_state() -> Any:
    """An empty state dict, with the metadata that hooks may look at."""
    state: Any = OrderedDict()
    state._metadata = OrderedDict()
    return state


def add_metadata(state: Any, prefix: str, module: nn.Module) -> dict[str, Any]:
    """What a state dict says of a module, before it is asked for its tensors."""
    said = {"version": module._version}
    state._metadata[prefix[:-1]] = said
    return said


# ---------------------------------------------------------------------- tensors

DTENSOR = Members("a DTensor", SEEN, ("_local_tensor", "__create_chunk_list__"))
WRAPPED = Members("the class of tensors", SEEN, ("_make_wrapper_subclass",))

#: This rank's tensor. ``to_local()`` would cost a dispatch and a view.
local_tensor: Any = attrgetter("_local_tensor")


def placed_like(like: DTensor, local: Tensor) -> DTensor:
    """A local tensor as the DTensor that has the mesh, placements and global shape of another."""
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        # Without shape and stride an uneven shard would be taken for an even one.
        shape=like.shape,
        stride=like.stride(),
    )


def box_of(tensor: DTensor) -> Box:
    """This rank's block of a DTensor."""
    (chunk,) = tensor.__create_chunk_list__()
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def strided_shard() -> type:
    """The placement of a dimension that two axes of a mesh cut, the inner one first."""
    found: type = imported(
        "torch.distributed.tensor.placement_types", "_StridedShard", "PyTorch 2.8 to 2.13"
    )
    return found


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a mesh is a slice of, or itself."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    resources: Any = imported(device_mesh.__name__, "_mesh_resources", "PyTorch 2.8")
    return resources.get_root_mesh(mesh)


def wrapper_tensor(
    cls: type[Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Any:
    """A tensor of a subclass that has a shape and no elements of its own."""
    WRAPPED.check(Tensor)
    return Tensor._make_wrapper_subclass(
        cls, shape, dtype=dtype, device=device, requires_grad=False
    )


def keeps_elements_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass whose elements lie in other tensors."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    seen = imported("torch.utils._python_dispatch", "is_traceable_wrapper_subclass", SEEN)
    if seen(tensor):
        return True
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:  # there is no memory behind the storage
        return True
    return False


# ---------------------------------------------------------------------- many tensors at once

#: Copy, interpolate and take the norm of lists of tensors, in few kernels.
foreach_copy_ = torch._foreach_copy_
foreach_lerp_ = torch._foreach_lerp_
foreach_norm = torch._foreach_norm

# ---------------------------------------------------------------------- replicas

GROUP = Members("a process group", SEEN, ("_device_types",))
WORLD = Members("the world of process groups", SEEN, ("pg_map", "pg_group_ranks"))
_DISTRIBUTED = "torch.distributed.distributed_c10d"


def default_store() -> dist.Store:
    """The store through which the default process group was made."""
    store: dist.Store = imported(_DISTRIBUTED, "_get_default_store", SEEN)()
    return store


def new_gloo_group(ranks: list[int], word: str, timeout: timedelta) -> dist.ProcessGroup:
    """A gloo group of some ranks, all of which make it now.

    Its addresses lie in the store under a word of their own: a store that outlives the ranks holds
    those of an earlier life, which gloo would take for current ones.

    Args:
        word: the same on all of these ranks, and never used before.
    """
    world: Any = imported(_DISTRIBUTED, "_world", SEEN)
    WORLD.check(world)
    default = dist.group.WORLD
    backend, store = world.pg_map[default]
    own = dist.PrefixStore(f"sharded_ema/{word}", store)
    if len(ranks) < dist.get_world_size():
        # new_group() would name it by what other groups this rank is in, which ranks may differ in.
        make = imported(_DISTRIBUTED, "_new_process_group_helper", SEEN)
        rank = ranks.index(dist.get_rank())
        group: dist.ProcessGroup
        group, _ = make(len(ranks), rank, ranks, "gloo", own, word, timeout=timeout)
        world.pg_group_ranks[group] = {each: position for position, each in enumerate(ranks)}
        return group
    world.pg_map[default] = (backend, own)
    try:
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
    finally:
        world.pg_map[default] = (backend, store)
    return group


def is_of_a_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective raised it because it broke; gloo has no class for that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def reached_devices(group: dist.ProcessGroup) -> set[str]:
    """Types of devices between which a process group can communicate."""
    GROUP.check(group)
    return {device.type for device in group._device_types}


def is_taken_from_a_dtensor(parameter: Tensor) -> bool:
    """Whether DistributedDataParallel on a mesh has put a DTensor's local tensor in its place."""
    return hasattr(parameter, "_st_info")


def ignored_by_ddp(ddp: DistributedDataParallel) -> set[str]:
    """Names of the parameters that DDP leaves alone."""
    ignored: set[str] = getattr(ddp, "parameters_to_ignore", set())
    return ignored


def is_composable_replica(module: nn.Module) -> bool:
    """Whether the older composable ``replicate()`` has wrapped a module."""
    return any(
        cls.__module__ == "torch.distributed._composable.replicate" for cls in type(module).__mro__
    )


# ---------------------------------------------------------------------- optimizers


def runs_own_hooks(optimizer: Any) -> bool:
    """Whether step hooks registered here run with it, and not with an optimizer that it wraps."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    inner = getattr(optimizer, "optimizer", None)
    return hooks is not None and hooks is not getattr(inner, "_optimizer_step_post_hooks", None)


def is_nested_step(optimizer: Optimizer) -> bool:
    """Whether a ``step()`` of this optimizer is running inside another one of its own."""
    return sum(1 for _ in _running_steps(optimizer)) > 1


def _running_steps(optimizer: Optimizer) -> Iterator[None]:
    code = getattr(type(optimizer).step, "__code__", None)
    frame = sys._getframe()
    while frame is not None:
        # All of torch's step() wrappers share this code object and unpack `self` the same way.
        if frame.f_code is code and frame.f_locals.get("self") is optimizer:
            yield
        frame = frame.f_back  # type: ignore[assignment]
