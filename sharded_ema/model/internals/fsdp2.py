"""``fully_shard`` (FSDP2): its sharded and its gathered state. Seen in PyTorch 2.8 to 2.13.

The sharded ``nn.Parameter`` objects stay the same for the life of a model, and so does the memory
of their local tensors. They are registered on the modules only while these are resharded; after a
forward without backward the root's plain, gathered parameters stand in their place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sharded_ema.model.internals.members import Members, imported

SEEN = "PyTorch 2.8 to 2.13"

MODULE = Members("a module under fully_shard", SEEN, ("_get_fsdp_state", "reshard"))
STATE = Members(
    "the state of fully_shard",
    SEEN,
    ("_training_state", "_state_ctx", "_is_root", "_comm_ctx"),
)
GROUP = Members(
    "the parameters of a fully_shard call",
    SEEN,
    ("_training_state", "wait_for_unshard", "_post_forward_indices"),
)


def check_members(model: nn.Module) -> None:
    """Look for what is used here.

    Raises:
        FrameworkVersionError: something is missing.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            MODULE.check(module)
            state = module._get_fsdp_state()
            STATE.check(state)
            for group in _groups(state):
                GROUP.check(group)


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
    states = imported("torch.distributed.fsdp._fully_shard._fsdp_common", "TrainingState", SEEN)
    if all(group._training_state != states.FORWARD for group in _groups(state)):
        return
    (root,) = (each for each in state._state_ctx.all_states if each._is_root)
    if hasattr(root, "_reset_iter_state"):
        root._reset_iter_state()
        return
    for each in root._state_ctx.all_states:  # what that does, for older PyTorch
        each._training_state = states.IDLE
        for group in _groups(each):
            group._training_state = states.IDLE
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
