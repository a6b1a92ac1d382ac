"""The tensors of a model under their unwrapped names, and what happens to each of them.

Wrappers of every kind are looked through, so that a name is the one in the ``state_dict()`` of the
bare model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from operator import is_

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from sharded_ema.errors import BindError, ConfigError, warn
from sharded_ema.model.internals.deepspeed import is_of_an_engine
from sharded_ema.model.internals.fsdp1 import is_flattened
from sharded_ema.model.internals.fsdp2 import is_converted_by_gathers, shard_inside
from sharded_ema.model.internals.pytorch import (
    EXTRA_STATE,
    MODULE,
    is_persistent,
    keeps_elements_elsewhere,
    local_tensor,
    own_buffers,
    own_parameters,
    registered_parameters,
)
from sharded_ema.model.layout import Shape
from sharded_ema.model.names import Keys, Parts, find_keys, walk


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """One tensor of the model under its unwrapped name.

    Attributes:
        fqn: fully qualified name in ``state_dict()`` of the bare model.
        owner: module that holds the tensor, as it is registered now.
        attribute: its name there.
        tensor: the parameter or buffer; parameters are held, buffers read anew at each use. Where
            a framework flattens parameters, the one that the optimizer trains.
        shape: global shape.
        aliases: other names of the same tensor (tied weights).
        paths: where modules have it, which are its names unless hooks change these.
    """

    fqn: str
    owner: nn.Module
    attribute: str
    tensor: Tensor
    shape: Shape
    aliases: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where its owner has it."""
        return self.paths[0] if self.paths else self.fqn

    @property
    def all_names(self) -> tuple[str, ...]:
        """What patterns may call it, each once."""
        return tuple(dict.fromkeys((self.fqn, *self.aliases, *self.paths)))

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, and no buffer."""
        return isinstance(self.tensor, nn.Parameter)

    def read(self) -> Tensor:
        """The tensor now: a parameter is held, a buffer looked up, as modules replace them freely.

        Raises:
            BindError: the buffer is gone.
        """
        if self.is_parameter:
            return self.tensor
        buffer = own_buffers(self.owner).get(self.attribute)
        if buffer is None:
            raise BindError(f"buffer {self.fqn} has been removed from the model")
        return buffer.detach()

    def registered(self) -> Tensor | None:
        """What its module has under the name of a parameter now."""
        return own_parameters(self.owner).get(self.attribute)


class ExtraState(Named):
    """What ``get_extra_state()`` of a module returns."""

    __slots__ = ()

    def read(self) -> Tensor:
        """It as it is now.

        Raises:
            BindError: it is no tensor any more.
        """
        value = self.owner.get_extra_state()
        if not isinstance(value, Tensor):
            raise BindError(
                f"get_extra_state() of a {type(self.owner).__name__} ({self.fqn}) has returned a "
                f"tensor before, and returns a {type(value).__name__} now; only tensors are saved"
            )
        return value.detach()


def _never(named: Named) -> bool:
    return False


@dataclass(slots=True)
class Inventory:
    """The tensors of a model, sorted by what happens to them.

    Attributes:
        model: whose tensors they are.
        averaged: trainable parameters that the patterns select.
        frozen: parameters with ``requires_grad=False``.
        excluded: trainable parameters that the patterns leave out.
        buffers: persistent buffers that are stored as they are.
        ignored: persistent buffers that are left out.
        extra: extra states of modules that are tensors.
        adapters: names of the PEFT adapters in it.
        selection: what of it was asked for.
        order: names of all its parameters, as it has them.
        is_settled: whether what is trained was settled when the model was wrapped, whatever
            ``requires_grad`` says later (DeepSpeed).
        registered: what the model has in the place of a parameter now.
        is_flattened: whether a framework keeps a parameter elsewhere than in its module.
    """

    model: nn.Module
    averaged: list[Named] = field(default_factory=list)
    frozen: list[Named] = field(default_factory=list)
    excluded: list[Named] = field(default_factory=list)
    buffers: list[Named] = field(default_factory=list)
    ignored: list[Named] = field(default_factory=list)
    extra: list[Named] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    selection: Selection = field(default_factory=lambda: Selection())
    order: list[str] = field(default_factory=list)
    is_settled: bool = False
    registered: Callable[[Named], Tensor | None] = Named.registered
    is_flattened: Callable[[Named], bool] = _never
    _held: list[Tensor] | None = None
    _watched: list[Named] | None = None
    _owners: list[nn.Module] = field(default_factory=list)
    _attributes: list[str] = field(default_factory=list)
    _tensors: list[Tensor] = field(default_factory=list)

    def averaged_now(self) -> list[Tensor]:
        """The averaged tensors. Parameter objects stay; only buffers are looked up every time."""
        if self._held is None:
            if not all(named.is_parameter for named in self.averaged):
                return [named.read() for named in self.averaged]
            self._held = [named.tensor for named in self.averaged]
        return self._held

    @property
    def parameters(self) -> list[Named]:
        """What of the averaged and the frozen tensors is a parameter, and no buffer."""
        return [n for n in (*self.averaged, *self.frozen) if n.is_parameter]

    @property
    def readable(self) -> list[Named]:
        """The parameters whose bytes can be read: those of quantised frozen ones cannot."""
        return [named for named in self.parameters if not _has_no_bytes(named.tensor)]

    def check_current(self) -> None:
        """Refuse a model of which a tensor in the inventory is no longer a part.

        Raises:
            BindError: see above.
        """
        names = {(id(module), prefix) for prefix, module in walk(self.model)}
        for named in (*self.averaged, *self.frozen, *self.buffers):
            there = (id(named.owner), named.path.removesuffix(named.attribute)) in names
            if there and (not named.is_parameter or self.registered(named) is named.tensor):
                continue
            raise _replaced(named)

    def check_not_replaced(self) -> None:
        """Refuse a module that has another parameter in the place of one that is averaged.

        At any moment of a step, and cheaper than :meth:`check_current`: other submodules are not
        looked for, and a parameter that is gathered at the moment counts as there.

        Raises:
            BindError: see above.
        """
        if self._watched is None:
            self._watched = [
                n for n in self.averaged if n.is_parameter and not self.is_flattened(n)
            ]
            self._tensors = [named.tensor for named in self._watched]
            self._owners = [named.owner for named in self._watched]
            self._attributes = [named.attribute for named in self._watched]
        found = registered_parameters(self._owners, self._attributes)
        if all(map(is_, found, self._tensors)):
            return
        for named, now in zip(self._watched, found, strict=True):
            if now is not named.tensor and not _is_gathered(named.tensor, now):
                raise _replaced(named)

    def check_stored_apart(self, *, frozen: bool) -> None:
        """Refuse what a save would have to store beside the averages and cannot.

        Args:
            frozen: whether frozen parameters are stored.

        Raises:
            BindError: see above.
        """
        for named in self.frozen if frozen else ():
            if _has_no_bytes(named.tensor):
                raise BindError(
                    f"parameter {named.fqn} is frozen and a {_kind(named.tensor)}, which keeps its "
                    "elements in other tensors, as quantisation makes, so that no save can store "
                    'it; pass frozen="skip", and take it from the base model at an export (--base)'
                )
        for named in self.buffers:
            if _has_no_bytes(named.tensor):
                raise BindError(
                    f"buffer {named.fqn} is a {_kind(named.tensor)}, which keeps its elements in "
                    "other tensors, so that no save can store it; pass "
                    f'buffers={{"{named.fqn}": "ignore"}}'
                )

    def not_known(self) -> Iterator[tuple[str, str]]:
        """What the model has by now that the inventory lacks: topics and messages of warnings."""
        known = {id(n.tensor) for n in (*self.averaged, *self.frozen, *self.excluded)}
        stored = (*self.averaged, *self.buffers, *self.ignored)
        places = {(id(named.owner), named.attribute) for named in stored}
        new = []
        for prefix, module in walk(self.model):
            for name, tensor in own_parameters(module).items():
                if tensor is not None and id(tensor) not in known and not is_flattened(tensor):
                    new.append(prefix + name)
            for name, buffer in own_buffers(module).items():
                if buffer is None or not is_persistent(module, name):
                    continue
                ignored = self.selection.of_buffer(prefix + name) == "ignore"
                if not ignored and (id(module), name) not in places:
                    new.append(prefix + name)
        if new:
            yield (
                "new tensors",
                f"{len(new)} parameters or buffers were added to the model after its average was "
                f"made, among them {new[:3]}; they are neither averaged nor stored, so that "
                f"exports lack them. {_REMEDY}",
            )
        thawed = [n.fqn for n in self.frozen if n.tensor.requires_grad and not self.is_settled]
        if thawed:
            yield (
                "thawed parameters",
                f"{len(thawed)} parameters that were frozen when the average was made have "
                f"requires_grad=True by now, among them {thawed[:3]}; they are stored as they are "
                f"and not averaged. {_REMEDY}",
            )


def _has_no_bytes(tensor: Tensor) -> bool:
    """Whether no plain tensor holds the elements, of a DTensor those of this rank."""
    local = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    converted = isinstance(tensor, DTensor) and is_converted_by_gathers(local)
    return keeps_elements_elsewhere(local) and not (converted and shard_inside(local))


def _kind(tensor: Tensor) -> str:
    return type(local_tensor(tensor) if isinstance(tensor, DTensor) else tensor).__name__


def _replaced(named: Named) -> BindError:
    return BindError(
        f"{'parameter' if named.is_parameter else 'buffer'} {named.fqn} was replaced after "
        "the average was made (by fully_shard or another wrapper, "
        "load_state_dict(assign=True), resizing, another submodule, adapters around it); "
        "make the ShardedEMA after wrapping, and after all such changes"
    )


def _is_gathered(held: Tensor, now: Tensor | None) -> bool:
    """Whether what a module has is what ``fully_shard`` has gathered of a parameter.

    That is a plain tensor, or a DTensor over the axes of the mesh that are left.
    """
    if now is None or not isinstance(held, DTensor):
        return False
    return not isinstance(now, DTensor) or now.device_mesh != held.device_mesh


_REMEDY = (
    "Make a new ShardedEMA after such a change and load the last save with strict=False, which "
    "keeps what is averaged already"
)


def as_model(target: nn.Module | Sequence[nn.Module]) -> nn.Module:
    """Several modules as one; anything else as it is.

    Raises:
        BindError: something in the list is no module.
    """
    if not isinstance(target, list | tuple):
        return target  # type: ignore[return-value]
    for part in target:
        if not isinstance(part, nn.Module):
            raise BindError(f"the parts of a model must be torch.nn.Modules, not {part!r}")
    return Parts(target)


def adapters_of(model: nn.Module) -> list[str]:
    """Names of the PEFT adapters of a model; none for what is no module."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    configs = (getattr(module, "peft_config", None) for module in modules)
    return sorted({name for config in configs if isinstance(config, dict) for name in config})


#: A parameter of a module: its name there, what is the same wherever the parameter is met again
#: (tied weights), the tensor and the global shape.
Found = tuple[str, Hashable, Tensor, Shape]


def parameters_of(module: nn.Module) -> Iterator[Found]:
    """The parameters of a module itself, without its children's."""
    for attribute, parameter in own_parameters(module).items():
        if parameter is not None:
            # ZeRO-3 leaves a partitioned parameter with no elements.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            yield attribute, id(parameter), parameter, tuple(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which tensors are averaged, as the user asked for.

    Attributes:
        include: shell-style patterns over names, of which a tensor must match one to be averaged.
            ``None``: all. A tied weight goes by any of its names.
        exclude: patterns of which it must match none.
        buffers: what becomes of buffers by patterns over their names, of which the first counts:
            ``"average"`` treats floating and complex ones like parameters, ``"copy"`` lists them
            apart, ``"ignore"`` leaves them out. What no pattern matches is copied.
        only: the names of what counts as averaged, whatever patterns or gradients say; ``None``
            if these decide.
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    buffers: tuple[tuple[str, str], ...] = ()
    only: frozenset[str] | None = None

    def takes(self, named: Named) -> bool:
        """Whether the patterns select a tensor by any of its names."""
        if self.only is not None:
            return not self.only.isdisjoint(named.all_names)
        return (self.include is None or _fits(named, self.include)) and not _fits(
            named, self.exclude
        )

    def of_buffer(self, *names: str) -> str:
        """What becomes of a buffer, which goes by any of its names."""
        if self.only is not None:
            return "copy" if self.only.isdisjoint(names) else "average"
        for pattern, what in self.buffers:
            if any(fnmatchcase(name, pattern) for name in names):
                return what
        return "copy"

    def check(self, parameters: Sequence[str], buffers: Sequence[str]) -> None:
        """Refuse a pattern that matches nothing.

        Args:
            parameters, buffers: all names there are.

        Raises:
            ConfigError: see above.
        """
        for pattern in (*(self.include or ()), *self.exclude):
            if any(fnmatchcase(name, pattern) for name in parameters):
                continue
            found = [name for name in buffers if fnmatchcase(name, pattern)]
            raise ConfigError(
                f"pattern {pattern!r} matches no parameter; "
                + (
                    f"it matches the buffer {found[0]}: buffers go by a dict such as "
                    f'buffers={{{pattern!r}: "copy", "*": "average"}}'
                    if found
                    else f"names look like {list(parameters[:3])}"
                )
            )
        for pattern, _ in self.buffers:
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in buffers):
                raise ConfigError(
                    f"pattern {pattern!r} of buffers matches no persistent buffer; their names "
                    f"look like {list(buffers[:3])}"
                )


def _fits(named: Named, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) for name in named.all_names for p in patterns)


def as_patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Name patterns as a tuple; one string is one pattern."""
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def take_inventory(
    model: nn.Module,
    selection: Selection,
    found_on: Callable[[nn.Module], Iterable[Found]] = parameters_of,
) -> Inventory:
    """List and sort the tensors of ``model``.

    Args:
        found_on: the parameters of one module itself.

    Raises:
        BindError: a parameter is on the meta device or has no elements, or none is left.
        ConfigError: a pattern matches nothing that can be averaged.
    """
    MODULE.check(model)
    found = Inventory(model, adapters=adapters_of(model), selection=selection)
    buffers: list[Named] = []
    parameters: dict[Hashable, Named] = {}
    taken: dict[str, Hashable] = {}
    for prefix, module in walk(model):
        _refuse_lazy(prefix, module)
    keys = find_keys(model, lambda module: ((a, tensor) for a, _, tensor, _ in found_on(module)))
    for prefix, module in walk(model):
        for attribute, identity, parameter, shape in found_on(module):
            path = prefix + attribute
            if taken.setdefault(path, identity) != identity:
                raise BindError(
                    f"two parts of the model have a parameter {path}; parts of one model keep the "
                    "names that they have in the whole (a ModuleDict of layers by their numbers)"
                )
            known = parameters.get(identity)
            parameters[identity] = (
                replace(known, paths=(*known.paths, path))
                if known
                else Named(path, module, attribute, parameter, shape, paths=(path,))
            )
        for attribute, buffer in own_buffers(module).items():
            if buffer is not None and is_persistent(module, attribute):
                path, shape = prefix + attribute, tuple(buffer.shape)
                named = Named(path, module, attribute, buffer, shape, paths=(path,))
                buffers.append(_under_its_keys(named, keys))
    parameters = {i: _under_its_keys(named, keys) for i, named in parameters.items()}
    found.order = [named.fqn for named in parameters.values()]
    found.extra = _extra_states(
        {key: module for key, module in keys.extra.items() if selection.of_buffer(key) != "ignore"}
    )
    for named in parameters.values():
        if selection.only is None and not named.tensor.requires_grad:
            found.frozen.append(named)
        elif selection.takes(named):
            found.averaged.append(named)
        else:
            found.excluded.append(named)
    for named in (*found.averaged, *found.frozen):
        _refuse_unusable(named)
    selection.check(
        [name for n in parameters.values() for name in n.all_names],
        [*(name for named in buffers for name in named.all_names), *keys.extra],
    )
    averaged = _sort_buffers(buffers, found)
    if not found.averaged and selection.only is not None:
        raise BindError(
            f"the module is another model: it lacks {sorted(selection.only)[:3]} and all others "
            "that are averaged"
        )
    if not found.averaged:
        raise BindError(
            "no parameter to average: the model has "
            f"{len(parameters)} parameters, {len(found.frozen)} of them frozen "
            f"(requires_grad=False) and {len(found.excluded)} left out by "
            f"include={selection.include} exclude={selection.exclude}"
        )
    found.averaged += averaged
    _warn_of_half_complex(found.buffers)
    if not found.adapters:  # whose exports are no whole models
        _warn_of_strangers(found, keys)
    return found


def _sort_buffers(buffers: Iterable[Named], found: Inventory) -> list[Named]:
    """Put buffers where they belong in an inventory, but for those to average, which are returned.

    Raises:
        BindError: one cannot be averaged.
    """
    averaged = []
    for named in buffers:
        what, tensor = found.selection.of_buffer(*named.all_names), named.tensor
        if what == "ignore":
            found.ignored.append(named)
        elif what == "average" and (tensor.is_floating_point() or tensor.is_complex()):
            _refuse_conjugated(named)
            averaged.append(named)
        else:
            found.buffers.append(named)
    return averaged


def _under_its_keys(named: Named, keys: Keys) -> Named:
    """A tensor by the names that the state dict gives it; by its path if it has none there."""
    names = list(dict.fromkeys(key for path in named.paths for key in keys.of(path)))
    names = names or [named.path]
    return replace(named, fqn=names[0], aliases=tuple(names[1:]))


def _extra_states(modules: Mapping[str, nn.Module]) -> list[Named]:
    """What modules, by its keys, store beside their tensors, as far as that is a tensor, too."""
    found: list[Named] = []
    others = []
    for key, module in modules.items():
        value = module.get_extra_state()
        if isinstance(value, Tensor):
            found.append(ExtraState(key, module, EXTRA_STATE, value, tuple(value.shape)))
        else:
            others.append(f"{key}, a {type(value).__name__}")
    if others:
        warn(
            f"get_extra_state() of {len(others)} modules returns no tensor ({others[0]}), which "
            "would have to be pickled: saves and exports leave it out. Load an export with "
            "strict=False, or let get_extra_state() return a tensor"
        )
    return found


def _warn_of_strangers(found: Inventory, keys: Keys) -> None:
    """Warn if an export would lack what the state dict has, or have what it lacks."""
    stored = (*found.averaged, *found.frozen, *found.buffers)
    lost = [named.path for named in stored if not any(map(keys.of, named.paths))]
    if keys.made or lost:
        warn(
            f"state_dict() of the model, as its hooks leave it, has {len(keys.made)} entries that "
            f"are no parameters or buffers of it {keys.made[:3]}, and lacks {len(lost)} that are "
            f"{lost[:3]}: saves and exports have what is in the modules, under its names there. "
            "Load an export with strict=False, or pass --rename to consolidate"
        )


# ---------------------------------------------------------------------- what cannot be averaged


def _refuse_lazy(prefix: str, module: nn.Module) -> None:
    """Refuse parameters and buffers whose shape is not known yet."""
    for name, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
        if tensor is not None and is_lazy(tensor):
            raise BindError(
                f"{prefix}{name} of a {type(module).__name__} is not initialised yet; run a "
                "forward before making the average"
            )


def refuse_partitioned(inventory: Inventory) -> None:
    """Refuse the module inside a DeepSpeed engine: only the engine leads to the masters.

    Raises:
        BindError: see above.
    """
    for named in (*inventory.averaged, *inventory.frozen, *inventory.excluded):
        if is_of_an_engine(named.tensor):
            raise BindError(
                f"parameter {named.fqn} belongs to DeepSpeed; pass the engine that "
                "deepspeed.initialize returned, not the module inside it"
            )


def _warn_of_half_complex(buffers: Iterable[Named]) -> None:
    """Warn of buffers that no save can hold, before the first save fails because of them."""
    found = [named.fqn for named in buffers if named.tensor.dtype is torch.complex32]
    if found:
        warn(
            f"the buffers {found[:3]} are complex numbers of two float16, which checkpoints cannot "
            "hold: save() refuses them. Register them with persistent=False, or pass "
            'buffers="ignore"'
        )


def _refuse_conjugated(named: Named) -> None:
    """Refuse complex numbers whose memory holds their conjugates."""
    if named.tensor.is_conj():
        raise BindError(
            f"{'parameter' if named.is_parameter else 'buffer'} {named.fqn} is conjugated lazily; "
            "make it of resolve_conj()"
        )


def _refuse_unusable(named: Named) -> None:
    """Refuse a parameter that cannot be averaged, or stored if it is frozen."""
    fqn, tensor = named.fqn, named.tensor
    _refuse_conjugated(named)
    if tensor.layout != torch.strided:
        raise BindError(f"parameter {fqn} has the layout {tensor.layout}; make it dense")
    overlaps = zip(tensor.shape, tensor.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in overlaps):
        raise BindError(
            f"parameter {fqn} is an expanded view, whose elements share memory; make it contiguous"
        )
    if tensor.requires_grad and tensor.dtype == torch.float4_e2m1fn_x2:
        raise BindError(
            f"parameter {fqn} packs two elements into a byte; average the parameters before "
            "they are quantised"
        )
    wrapped = keeps_elements_elsewhere(tensor) and not isinstance(tensor, DTensor)
    if tensor.requires_grad and wrapped:
        raise BindError(
            f"parameter {fqn} is a {type(tensor).__name__}, which keeps its elements in other "
            "tensors; only plain tensors can be averaged. Convert the model after making its "
            "average, or exclude it"
        )
    if tensor.is_meta:
        raise BindError(
            f"parameter {fqn} is on the meta device; materialise the model (to_empty and "
            "initialise, or load a checkpoint) before making its average"
        )
    if not math.prod(named.shape):
        raise BindError(
            f"parameter {fqn} has shape {named.shape}, that is 0 elements; remove it from the model"
        )
