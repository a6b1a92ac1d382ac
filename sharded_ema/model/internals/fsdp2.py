"""``fully_shard`` (FSDP2): its sharded and its gathered state. Seen in PyTorch 2.8 to 2.13.

The sharded ``nn.Parameter`` objects stay the same for the life of a model, and so does the memory
of their local tensors. They are registered on the modules only while these are resharded; after a
forward without backward the root's plain, gathered parameters stand in their place.

What is gathered is used by the next forward, whenever that comes: also what was begun early and not
used (``unshard(async_op=True)``, prefetch of a layer that a forward left out), and what a forward
or backward held that an exception ended. And it may be a module above the model that gathers the
parameters of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sharded_ema.errors import StateError
from sharded_ema.model.devices import wait_for
from sharded_ema.model.internals.members import Members, imported
from sharded_ema.model.internals.pytorch import is_being_called, is_in_a_backward

SEEN = "PyTorch 2.8 to 2.13"

MODULE = Members("a module under fully_shard", SEEN, ("_get_fsdp_state",))
STATE = Members(
    "the state of fully_shard",
    SEEN,
    (
        "_training_state", "_state_ctx", "_is_root", "_comm_ctx", "_modules",
        "_modules_to_run_forward",
    ),
)  # fmt: skip
CONTEXT = Members(
    "what the states of fully_shard share",
    SEEN,
    ("all_states", "iter_forward_root", "post_backward_final_callback_queued"),
)
GROUP = Members(
    "the parameters of a fully_shard call",
    SEEN,
    (
        "fsdp_params", "device", "device_handle", "reshard", "_training_state",
        "_all_gather_result", "_post_forward_indices", "_partial_reduce_output",
        "_post_reduce_event", "_all_reduce_state", "_reshard_after_forward_event",
    ),
)  # fmt: skip
PARAMETER = Members(
    "a parameter of fully_shard", SEEN, ("_module_info", "unsharded_accumulated_grad")
)
PLACE = Members("where a parameter of fully_shard is", SEEN, ("module", "shared_modules"))
GATHER = Members("a gather of fully_shard", SEEN, ("all_gather_event", "all_gather_work"))
STREAMS = Members(
    "the streams of fully_shard", SEEN, ("all_gather_state", "post_forward_order")
)  # once a forward has run


def states_of(model: nn.Module) -> list[Any]:
    """The states of all fully_shard calls that hold parameters of a model, in it or above it.

    Raises:
        FrameworkVersionError: they are kept in another way.
    """
    inside = dict.fromkeys(model.modules())
    # All modules in the process that a composable API has wrapped: no module knows its parents.
    wrapped = imported("torch.distributed._composable_state", "_module_state_mapping", SEEN)
    found: dict[int, Any] = {}
    for module in (*inside, *list(wrapped)):
        if isinstance(module, FSDPModule):
            MODULE.check(module)
            state: Any = module._get_fsdp_state()
            STATE.check(state)
            CONTEXT.check(state._state_ctx)
            if module in inside or any(_holds(group, inside) for group in _groups(state)):
                found.setdefault(id(state), state)
    return list(found.values())


def _holds(group: Any, modules: Mapping[nn.Module, None]) -> bool:
    """Whether a parameter of the group is one of these modules', be it under its second name."""
    for parameter in group.fsdp_params:
        PARAMETER.check(parameter)
        place = parameter._module_info
        PLACE.check(place)
        if any(module in modules for module in (place.module, *place.shared_modules)):
            return True
    return False


def is_converted_by_gathers(local: Tensor) -> bool:
    """Whether a local tensor is of a subclass that says how FSDP2 gathers it, such as in float8."""
    return hasattr(local, "fsdp_pre_all_gather")


def shard_inside(local: Any) -> str | None:
    """Under which name such a tensor holds the shard that is trained; ``None`` if it holds none.

    Of the tensors that it is made of (``__tensor_flatten__``) it is the one of its shape and dtype,
    the others being scales and the like.
    """
    names, _ = local.__tensor_flatten__()
    inside = [(name, getattr(local, name)) for name in names]
    found = [
        name
        for name, tensor in inside
        if type(tensor) in (Tensor, nn.Parameter)
        and (tensor.shape, tensor.dtype) == (local.shape, local.dtype)
    ]
    return found[0] if len(found) == 1 else None


def _groups(state: Any) -> list[Any]:
    """The parameter groups of a ``fully_shard`` call, of which older PyTorch has at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        groups = list(state._fsdp_param_groups)
    else:
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    for group in groups:
        GROUP.check(group)
    return groups


def compute_devices(model: nn.Module) -> frozenset[torch.device]:
    """Where the parameters of a model are gathered; its shards may lie in host memory."""
    return frozenset(group.device for state in states_of(model) for group in _groups(state))


def settle(model: nn.Module) -> None:
    """Free what is gathered or being gathered of a model, so that its sharded parameters count.

    Raises:
        StateError: this is called from within a forward or backward.
    """
    states = states_of(model)
    for context in {id(state._state_ctx): state._state_ctx for state in states}.values():
        if _is_in_a_pass(context):
            _refuse_if_running(context)
            _end_pass(context)
    for state in states:
        for group in _groups(state):
            _drop_gather(group)
            group.reshard()


# ---------------------------------------------------------------------- a pass that did not end


def _is_in_a_pass(context: Any) -> bool:
    """Whether a forward or backward has begun and not come to its end."""
    idle = _idle()
    return (
        context.iter_forward_root is not None
        or context.post_backward_final_callback_queued
        or any(
            part._training_state != idle
            for state in context.all_states
            for part in (state, *_groups(state))
        )
    )


def _idle() -> Any:
    module = "torch.distributed.fsdp._fully_shard._fsdp_common"
    return imported(module, "TrainingState", SEEN).IDLE


def _refuse_if_running(context: Any) -> None:
    """Tell a pass that goes on from one that an exception ended; PyTorch has one state for both."""
    modules = [module for state in context.all_states for module in state._modules]
    if is_in_a_backward() or is_being_called(modules):
        raise StateError(
            "the average was used from within a forward or backward of the model under fully_shard "
            "(a hook, or a swap() inside a forward()), which goes on with what it has gathered; "
            "use the average before or after"
        )


def _end_pass(context: Any) -> None:
    """Give up a forward or backward that an exception ended; else nothing would be freed.

    PyTorch leaves that up to the user (``reset_iter_state``). Like there, the gradients of a
    backward that did not end are lost; what was accumulated before a forward that did not is kept.
    """
    groups = [group for state in context.all_states for group in _groups(state)]
    in_backward = context.post_backward_final_callback_queued
    partial = [None if in_backward else group._partial_reduce_output for group in groups]
    (root,) = (state for state in context.all_states if state._is_root)
    if hasattr(root, "_reset_iter_state"):
        root._reset_iter_state()
    else:
        _reset(context, root)
    for group, output in zip(groups, partial, strict=True):
        group._partial_reduce_output = output
        if in_backward:
            _forget_gradients(group)


def _reset(context: Any, root: Any) -> None:
    """What ``_reset_iter_state`` does, for older PyTorch."""
    STREAMS.check(root._comm_ctx)
    for state in context.all_states:
        state._training_state = _idle()
        state._modules_to_run_forward.clear()
        for group in _groups(state):
            wait_for([group.device])  # for all of the events that are forgotten here
            _drop_gather(group)
            group._training_state = _idle()
            group._post_forward_indices.clear()
            group._post_reduce_event = None
            group._all_reduce_state = None
            group._reshard_after_forward_event = None
    root._comm_ctx.all_gather_state = None
    root._comm_ctx.reduce_scatter_state = None
    root._comm_ctx.post_forward_order.clear()
    context.iter_forward_root = None
    context.post_backward_final_callback_queued = False


def _forget_gradients(group: Any) -> None:
    """Drop gradients of gathered parameters, which no ``zero_grad()`` reaches."""
    for parameter in group.fsdp_params:
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):  # it was gathered once
            parameter._unsharded_param.grad = None


def _drop_gather(group: Any) -> None:
    """Forget a gather that was begun and not used, once it has ended.

    As PyTorch does at the end of a backward.
    """
    gather = group._all_gather_result
    if gather is None:
        return
    GATHER.check(gather)
    if gather.all_gather_event is not None:
        group.device_handle.current_stream().wait_event(gather.all_gather_event)
    if isinstance(gather.all_gather_work, dist.Work):
        gather.all_gather_work.wait()
    group._all_gather_result = None


# ---------------------------------------------------------------------- a second module


# What torch.compile and fully_shard note on modules; in what the last key has are its states.
_MARKS = ("_compiled_call_impl", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
_STATES = "__composable_api"
WRAPPED = Members(
    "the parameters of a fully_shard call",
    SEEN,
    ("mesh_info", "mp_policy", "offload_policy", "lazy_init"),
)
DIVIDED = Members("a parameter of fully_shard", SEEN, ("fsdp_placement", "sharded_param"))


def is_mark(name: str) -> bool:
    """Whether an attribute of a module tells how it is wrapped, and not what it computes."""
    return name in _MARKS or name.startswith(_STATES)


def is_own(hook: Any) -> bool:
    """Whether a hook of a module is one that ``fully_shard`` has registered."""
    inner = getattr(hook, "__func__", getattr(hook, "func", hook))
    return str(getattr(inner, "__module__", "")).startswith(
        ("torch.distributed.fsdp", "torch.distributed._composable", "torch._dynamo")
    )


def meshes(model: nn.Module) -> dict[int, DeviceMesh]:
    """The mesh that ``fully_shard`` divides each of its parameters over, by their identity."""
    found = {}
    for state in states_of(model):
        for group in _groups(state):
            WRAPPED.check(group)
            for divided in group.fsdp_params:
                DIVIDED.check(divided)
                found[id(divided.sharded_param)] = group.mesh_info.mesh
    return found


def wrap_alike(
    model: nn.Module, copies: Mapping[int, nn.Module], dtype: torch.dtype | None
) -> None:
    """``fully_shard`` the copies of the modules of a model as these are, from the inside out.

    What a forward has gathered is always freed: nobody would gather it again after an update.

    Args:
        copies: by the identity of modules.
        dtype: to gather and compute in; ``None`` for that of the model.
    """
    outer_first = sorted(
        states_of(model), key=lambda state: -max(len(list(m.modules())) for m in state._modules)
    )
    for state in reversed(outer_first):
        modules = [copies[id(module)] for module in state._modules if id(module) in copies]
        groups = _groups(state)
        if not groups or len(modules) != len(state._modules):
            continue
        for group in groups:
            WRAPPED.check(group)
        group = groups[0]
        places: dict[int, Any] = {}
        for each in groups:
            for divided in each.fsdp_params:
                DIVIDED.check(divided)
                place = divided._module_info
                copied = copies[id(place.module)]._parameters[place.param_name]
                places[id(copied)] = divided.fsdp_placement
        own = {id(p) for module in modules for p in module.parameters()}
        ignored = {
            p
            for module in modules
            for p in module.parameters()
            if id(p) in own - places.keys() and not isinstance(p, DTensor)
        }
        policy = replace(group.mp_policy, param_dtype=_computed_in(group, dtype))
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=group.mesh_info.mesh,
            reshard_after_forward=True,
            shard_placement_fn=lambda p, places=places: places[id(p)],
            mp_policy=policy,
            offload_policy=group.offload_policy,
            ignored_params=ignored,
        )


def cast_alike(
    model: nn.Module, copies: Mapping[int, nn.Module], dtype: torch.dtype | None
) -> dict[int, torch.dtype]:
    """Cast what goes into and comes out of copies as ``fully_shard`` does for the modules.

    For copies that are not wrapped themselves.

    Args:
        copies: by the identity of modules.
        dtype: to compute in; ``None`` for that of the model.

    Returns:
        What each parameter under ``fully_shard`` is computed in, by its identity.
    """
    computed: dict[int, torch.dtype] = {}
    for state in states_of(model):
        for group in _groups(state):
            WRAPPED.check(group)
            wanted = _computed_in(group, dtype)
            for divided in group.fsdp_params:
                DIVIDED.check(divided)
                parameter = divided.sharded_param
                computed[id(parameter)] = wanted or parameter.dtype
            policy = replace(group.mp_policy, param_dtype=wanted)
            for module in state._modules:
                if id(module) in copies:
                    _cast_around(copies[id(module)], policy)
    return computed


def _cast_around(module: nn.Module, policy: MixedPrecisionPolicy) -> None:
    tree_map = imported("torch.utils._pytree", "tree_map_only", SEEN)

    def cast(values: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None:
            return values
        return tree_map(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)

    if policy.cast_forward_inputs:
        module.register_forward_pre_hook(
            lambda _, arguments, named: cast((arguments, named), policy.param_dtype),
            with_kwargs=True,
        )
    module.register_forward_hook(lambda _, __, result: cast(result, policy.output_dtype))


def _computed_in(group: Any, dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None or group.mp_policy.param_dtype is not None:
        return dtype or group.mp_policy.param_dtype
    dtypes = {divided.sharded_param.dtype for divided in group.fsdp_params}
    return dtypes.pop() if len(dtypes) == 1 else None


def take_up(model: nn.Module) -> None:
    """Let ``fully_shard`` take up parameters that were replaced, and pad their shards."""
    for state in states_of(model):
        for group in _groups(state):
            group.lazy_init()
