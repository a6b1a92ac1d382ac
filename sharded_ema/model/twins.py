"""A second module like the one that trains, whose parameters are somebody else's memory.

Its structure is copied attribute by attribute, its parameters are given to it, and its buffers are
its own. It computes and never trains: what would change its parameters is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sharded_ema.errors import BindError, StateError, UnsupportedLayoutError, warn
from sharded_ema.model.internals import fsdp2
from sharded_ema.model.internals.pytorch import (
    COMPILED,
    copy_plan,
    hooks_of,
    is_of_a_plan,
    is_persistent,
    local_tensor,
    own_buffers,
    own_children,
    own_parameters,
    placed_like,
    tensors_in,
)
from sharded_ema.model.names import Parts, walk
from sharded_ema.model.presented import Running, Whole, present, refuse_kept_elsewhere
from sharded_ema.model.sources.ddp import DDPShards
from sharded_ema.model.sources.fsdp2 import FSDP2Shards
from sharded_ema.model.sources.protocol import ReadsShards
from sharded_ema.model.sources.replicas import Shares
from sharded_ema.model.steps import StepWatch

#: The copy of each module, by the identity of the original.
Copies = dict[int, nn.Module]

_REMEDY = (
    "keep a module of your own, and call ema.copy_to(module=it) after each update, which takes a "
    "second copy of the weights"
)


class Twin:
    """A module whose averaged parameters are tensors of the shadow.

    Args:
        reader: the shards of the model that trains.
        shadow: the average of each of them, in the same order.
        dtype: to compute in; ``None`` for that of the model.
        build: makes a module like the model; ``None`` to copy its structure.
        refuse: raises if it must not be used now.
        moment: tells something else after each change of the average.

    Attributes:
        module: it.
        homes: for each shard the memory that its average has to live in from now on: that given,
            unless a framework has padded it.
        is_running: whether its forward goes on.

    Raises:
        UnsupportedLayoutError: the layout has no place for it.
        BindError: it cannot be copied, or what was built is another model.
    """

    def __init__(
        self,
        reader: ReadsShards,
        shadow: Sequence[Tensor],
        *,
        dtype: torch.dtype | None,
        build: Callable[[], nn.Module] | None,
        refuse: Callable[[], None],
        moment: Callable[[], Hashable],
    ) -> None:
        _check_layout(reader)
        original = _inside(reader.inventory.model)
        if reader.kind == "fsdp2":
            fsdp2.settle(original)
        shares = _shared(reader)
        averages = {id(s.name.tensor): view for s, view in zip(reader.shards, shadow, strict=True)}
        divided = fsdp2.meshes(original)
        self._is_sharded = bool(divided) and shares is None
        tensors = (
            _tensors(original, averages, left_out=divided.keys(), in_parts=())
            if self._is_sharded
            else _tensors(original, averages, in_parts={*divided, *_parted(shares)})
        )
        copies = _copied(original, tensors) if build is None else _built(build, original)
        self.module = copies[id(original)]
        for module in original.modules():
            copy_plan(module, copies[id(module)])
        _give_buffers(original, copies, tensors)
        if self._is_sharded:
            _give_meta(original, copies, averages, tensors)
            fsdp2.wrap_alike(original, copies, dtype)
            _give_sharded(original, copies, averages)
        else:
            _give_present(original, copies, tensors, dtype, shares)
        places = [(copies[id(s.name.owner)], s.name.attribute) for s in reader.shards]
        self.homes = [
            view if not s.name.is_parameter else _local(own_parameters(module)[attribute])
            for s, view, (module, attribute) in zip(reader.shards, shadow, places, strict=True)
        ]
        self.is_running = False
        self._refuse, self._moment = refuse, moment
        self._places = [
            (module, attribute, home, s.name.fqn)
            for s, home, (module, attribute) in zip(reader.shards, self.homes, places, strict=True)
            if s.name.is_parameter
        ]
        self._watch = StepWatch(self._owns, self._refuse_step)
        self._guard()

    def end(self) -> None:
        """No longer watch over it."""
        self._watch.remove()

    def settle(self) -> None:
        """Free what is gathered of it: by its user, or by a forward that an exception ended."""
        if self._is_sharded:
            fsdp2.settle(self.module)

    # ------------------------------------------------------------------ guards

    def _guard(self) -> None:
        module = self.module
        # First in, last out: before a framework gathers, and after it has freed.
        module.register_forward_pre_hook(self._enter, prepend=True)
        module.register_forward_hook(self._leave, always_call=True)
        module.register_load_state_dict_pre_hook(_refuse_load)
        for name, what in _CHANGES.items():
            setattr(module, name, _Refusal(what))

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        self._refuse()
        for owner, attribute, home, name in self._places:
            parameter = own_parameters(owner)[attribute]
            if parameter is None or _local(parameter).data_ptr() != home.data_ptr():
                raise StateError(
                    f"parameter {name} of the module of an average lies elsewhere than the "
                    "average, which it would not follow: it was moved, replaced, gathered with "
                    "unshard(), or by a forward that an exception ended. Call ema.module() again, "
                    "which frees what is gathered, and leave the parameters as they are"
                )
            if parameter.requires_grad:
                raise StateError(
                    f"parameter {name} of the module of an average has requires_grad=True; it is "
                    "the average and is not trained. Take the gradients of the model itself"
                )
        self.is_running = True

    def _leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        self.is_running = False
        for tensor in tensors_in(result):
            if tensor.requires_grad:  # as what went in does
                tensor.register_hook(partial(self._before_backward, self._moment()))

    def _before_backward(self, moment: Hashable, gradient: Tensor) -> None:
        # What autograd has kept is the memory of the average, or is gathered from it again.
        if self._moment() != moment:
            raise StateError(
                "the average has moved since the forward of its module whose backward is taken "
                "now, which would give the gradients of other weights; call backward() before the "
                "update, or compute in torch.no_grad() what needs no gradients"
            )

    def _owns(self, optimizer: Optimizer) -> bool:
        mine = {id(parameter) for parameter in self.module.parameters()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def _refuse_step(self) -> None:
        raise StateError(
            "an optimizer is about to step that has parameters of the module of an average: they "
            "are the average, which only its own updates move. Give it those of the model"
        )


class _Refusal:
    """Stands in the place of a method that would change the parameters."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __call__(self, *arguments: Any, **named: Any) -> NoReturn:
        raise StateError(
            f"the module of an average was to be {self._what}, and its parameters are the average "
            "itself; make another with ema.module(dtype=...), or one of your own with "
            "ema.copy_to(module=...)"
        )


_CHANGES = {"_apply": "moved or converted", "requires_grad_": "trained"}


def _refuse_load(module: nn.Module, *arguments: Any) -> None:
    _Refusal("loaded from a state dict")()


# ---------------------------------------------------------------------- what can have one


def _check_layout(reader: ReadsShards) -> None:
    if reader.kind not in ("plain", "ddp", "fsdp2"):
        raise UnsupportedLayoutError(
            f"ema.module() is not possible with {reader.kind}, which has no place for a second "
            f"module in memory of its own choice; {_REMEDY}"
        )
    if isinstance(_inside(reader.inventory.model), Parts):
        raise UnsupportedLayoutError(
            f"ema.module() is not possible for a model in several parts, none of which is all of "
            f"it; {_REMEDY}"
        )
    model = _inside(reader.inventory.model)
    meshes = fsdp2.meshes(model)
    for named in reader.inventory.parameters:
        mesh = meshes.get(id(named.tensor))
        if mesh is not None and named.tensor.device_mesh.ndim > mesh.ndim:  # type: ignore[attr-defined]
            raise UnsupportedLayoutError(
                f"ema.module() cannot divide {named.fqn} as the model's is, by fully_shard and by "
                f"tensor parallelism; {_REMEDY}"
            )
    parted = _parted(_shared(reader))
    refuse_kept_elsewhere(
        model,
        {
            id(named.tensor): named.fqn
            for named in reader.inventory.parameters
            if id(named.tensor) in parted
        },
    )


def _shared(reader: ReadsShards) -> Shares | None:
    """How replicas share the averages, if they do."""
    if isinstance(reader, DDPShards | FSDP2Shards) and reader.shares.together:
        return reader.shares
    return None


def _parted(shares: Shares | None) -> dict[int, int]:
    """Which averages replicas share: their positions, by the identity of the parameter."""
    if shares is None:
        return {}
    return {id(shares.shards[i].name.tensor): i for i in shares.parted}


def _inside(model: nn.Module) -> nn.Module:
    """The module inside wrappers that only matter for training."""
    while isinstance(model, DistributedDataParallel) or COMPILED in own_children(model):
        inner = own_children(model)
        model = inner[COMPILED if COMPILED in inner else "module"]  # type: ignore[assignment]
    return model


# ---------------------------------------------------------------------- the structure


def _copied(original: nn.Module, tensors: Mapping[int, Tensor]) -> Copies:
    """A copy of every module, without parameters, buffers and hooks.

    Args:
        tensors: what attributes get that lead to a parameter or buffer, by its identity.
    """
    modules = list(original.modules())
    copies: Copies = {}
    memo: dict[int, Any] = {}
    for module in modules:
        made = object.__new__(_bare_class(module))
        nn.Module.__init__(made)
        copies[id(module)] = memo[id(module)] = made
    for module in modules:
        for tensor in (*own_parameters(module).values(), *own_buffers(module).values()):
            if tensor is not None:  # an attribute that leads to one is no copy of it
                memo[id(tensor)] = tensors.get(id(tensor), tensor)
    for module in modules:  # first, as what a wrapper does not have it asks its child for
        for name, child in own_children(module).items():
            own_children(copies[id(module)])[name] = None if child is None else copies[id(child)]
    made_anew = nn.Module().__dict__.keys()
    hooks = []
    for module in modules:
        made = copies[id(module)]
        try:
            for name, value in module.__dict__.items():
                if name not in made_anew and not fsdp2.is_mark(name):
                    object.__setattr__(made, name, copy.deepcopy(value, memo))
        except (TypeError, AttributeError, RuntimeError, AssertionError) as error:
            raise BindError(
                f"a {type(module).__name__} cannot be copied ({error}); pass "
                "ema.module(build=function), which returns a module like the model, not wrapped"
            ) from error
        hooks += [
            type(module).__name__
            for hook in hooks_of(module)
            if not (fsdp2.is_own(hook) or is_of_a_plan(hook))
        ]
    if hooks:
        warn(
            f"modules ({', '.join(dict.fromkeys(hooks))}) have forward hooks, which the module of "
            "the average does not get; if its result depends on them, register them on it, too"
        )
    return copies


def _bare_class(module: nn.Module) -> type[nn.Module]:
    """Its class as it was before ``fully_shard`` gave it another."""
    kinds = type(module).__mro__
    return next(c for c in kinds if issubclass(c, nn.Module) and not issubclass(c, FSDPModule))


def _built(build: Callable[[], nn.Module], original: nn.Module) -> Copies:
    """The modules of what the user has built, by those of the model at the same places."""
    made = build()
    theirs = dict(walk(made))
    copies: Copies = {}
    for prefix, module in walk(original):
        if prefix not in theirs or own_parameters(module).keys() - own_parameters(theirs[prefix]):
            raise BindError(
                f"what build= has returned is another model: it has no {prefix or 'root'} like "
                "that of the model; build what the model was made of, not wrapped"
            )
        copies[id(module)] = theirs[prefix]
    return copies


# ---------------------------------------------------------------------- the tensors


def _tensors(
    original: nn.Module,
    averages: Mapping[int, Tensor],
    *,
    in_parts: Collection[int],
    left_out: Collection[int] = (),
) -> dict[int, Tensor]:
    """What stands for each parameter and buffer of the model, by its identity.

    Averaged ones are the average. Other parameters are the model's own; other buffers are copied
    once and belong to the module of the average from then on.

    Args:
        in_parts: identities of parameters for which this rank's part is given as it is, without
            saying what it is part of.
        left_out: those of parameters for which there is nothing.
    """
    made: dict[int, Tensor] = {}
    for module in original.modules():
        for buffer in own_buffers(module).values():
            if buffer is not None and id(buffer) not in made:
                average = averages.get(id(buffer))
                made[id(buffer)] = buffer.detach().clone() if average is None else average
    for _, _, parameter in _each(original):
        if parameter is not None and id(parameter) not in left_out:
            view = averages.get(id(parameter), _local(parameter))
            if isinstance(parameter, DTensor) and id(parameter) not in in_parts:
                view = placed_like(parameter, view)
            made.setdefault(id(parameter), nn.Parameter(view, requires_grad=False))
    return made


def _give_buffers(original: nn.Module, copies: Copies, tensors: Mapping[int, Tensor]) -> None:
    for module in original.modules():
        for name, buffer in own_buffers(module).items():
            value = None if buffer is None else tensors[id(buffer)]
            copies[id(module)].register_buffer(name, value, persistent=is_persistent(module, name))


def _each(original: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter | None]]:
    for module in original.modules():
        for name, parameter in own_parameters(module).items():
            yield module, name, parameter


def _give_present(
    original: nn.Module,
    copies: Copies,
    tensors: Mapping[int, Tensor],
    dtype: torch.dtype | None,
    shares: Shares | None,
) -> None:
    """Parameters that are tensors of the shadow; what is not averaged is the model's own.

    Args:
        shares: how the replicas share the shadow, or ``None`` where each has all that it needs.
    """
    running = Running(copies[id(original)])
    divided = {} if shares is None else fsdp2.cast_alike(original, copies, dtype)
    parted = _parted(shares)
    for module, name, parameter in _each(original):
        own = None if parameter is None else tensors[id(parameter)]
        assert own is None or isinstance(own, nn.Parameter)
        copies[id(module)].register_parameter(name, own)
        if parameter is None or own is None:
            continue
        wanted = parameter.dtype if dtype is None or not own.is_floating_point() else dtype
        wanted = divided.get(id(parameter), wanted)
        if shares is not None and (id(parameter) in parted or id(parameter) in divided):
            index, gathered = parted.get(id(parameter)), id(parameter) in divided
            whole = Whole(parameter, shares, index, gathered=gathered, dtype=wanted)
            present(copies[id(module)], name, whole, running)
        elif own.dtype != wanted:
            present(copies[id(module)], name, partial(Tensor.to, dtype=wanted), running)


def _give_meta(
    original: nn.Module,
    copies: Copies,
    averages: Mapping[int, Tensor],
    tensors: Mapping[int, Tensor],
) -> None:
    """Parameters without memory, of global shapes, for ``fully_shard`` to divide."""
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in _each(original):
        own = None if parameter is None else tensors.get(id(parameter))
        if isinstance(parameter, DTensor):
            dtype = averages.get(id(parameter), parameter).dtype
            view = torch.empty(parameter.shape, dtype=dtype, device="meta")
            own = made.setdefault(id(parameter), nn.Parameter(view, requires_grad=False))
        assert own is None or isinstance(own, nn.Parameter)
        copies[id(module)].register_parameter(name, own)


def _give_sharded(original: nn.Module, copies: Copies, averages: Mapping[int, Tensor]) -> None:
    """Memory for the shards, in which the framework keeps them: padded, where they are uneven."""
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in _each(original):
        if not isinstance(parameter, DTensor):
            continue
        divided = own_parameters(copies[id(module)])[name]
        if not isinstance(divided, DTensor) or divided.placements != parameter.placements:
            raise UnsupportedLayoutError(
                f"ema.module() cannot divide {name} of a {type(module).__name__} as the model's "
                f"is, {parameter.placements}, with fully_shard alone; "
                f"{_REMEDY}"
            )
        averaged = averages.get(id(parameter))
        local = local_tensor(parameter).detach() if averaged is None else averaged
        if averaged is not None:
            local = torch.empty_like(local, memory_format=torch.contiguous_format).copy_(local)
        shard = placed_like(divided, local)
        own = made.setdefault(id(parameter), nn.Parameter(shard, requires_grad=False))
        own_parameters(copies[id(module)])[name] = own
    fsdp2.take_up(copies[id(original)])


def _local(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    tensor = local_tensor(parameter) if isinstance(parameter, DTensor) else parameter
    return tensor.detach()
