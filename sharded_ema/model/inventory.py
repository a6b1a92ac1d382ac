"""What a framework must tell: which tensors exist, and which part of each this rank owns.

A source reads a model; it never computes an average and keeps no copy of anything. Adding a
framework means one subclass of :class:`ShardSource` in a file of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_ema.errors import BindError, ConfigError
from sharded_ema.model.agreement import refuse_differing
from sharded_ema.model.layout import Box, FlatRange, Shape
from sharded_ema.model.pieces import whole
from sharded_ema.model.usable import refuse_lazy, refuse_unusable, warn_of_complex

#: Tensors that a swap overwrites, each with a copy of what it held.
Backup = list[tuple[Tensor, Tensor]]

# Attributes through which wrappers hold the module they wrap. They are no part of the name that
# the bare model's state_dict() gives a parameter.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}


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
    """

    fqn: str
    owner: nn.Module
    attribute: str
    tensor: Tensor
    shape: Shape
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What this rank owns of one averaged tensor: a flat range inside a box.

    Attributes:
        name: the tensor and its name.
        shape: global shape.
        box: this rank's block of the global tensor.
        range: elements of the box that this rank averages, or ``None`` for all of them.
        order: dimensions from the outermost to the innermost in memory, if ``range`` counts in
            that order; ``None`` for C order.
        writes: whether this rank writes the piece into checkpoints; of equal copies one does.
    """

    name: Named
    shape: Shape
    box: Box
    range: FlatRange | None = None
    order: tuple[int, ...] | None = None
    writes: bool = True

    @property
    def numel(self) -> int:
        """Elements of the shadow on this rank."""
        return self.box.numel if self.range is None else self.range.numel


@dataclass(slots=True)
class Inventory:
    """The tensors of a model, sorted by what happens to them.

    Attributes:
        model: whose tensors they are.
        averaged: trainable parameters that the patterns select.
        frozen: parameters with ``requires_grad=False``.
        excluded: trainable parameters that the patterns leave out.
        buffers: persistent buffers.
        adapters: names of the PEFT adapters in it.
    """

    model: nn.Module
    averaged: list[Named] = field(default_factory=list)
    frozen: list[Named] = field(default_factory=list)
    excluded: list[Named] = field(default_factory=list)
    buffers: list[Named] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> list[Named]:
        """What of the averaged and the frozen tensors is a parameter, and no buffer."""
        return [n for n in (*self.averaged, *self.frozen) if isinstance(n.tensor, nn.Parameter)]


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules with the prefix their tensors have in the bare model's ``state_dict()``.

    A shared module is met once under each of its names, as in ``state_dict()``.
    """
    yield prefix, module
    is_parallel = isinstance(module, DistributedDataParallel | nn.DataParallel)
    for name, child in module._modules.items():
        # Lightning Fabric holds a module twice: wrapped, and as it was.
        again = name == "_original_module" and "_forward_module" in module._modules
        if child is not None and not again:
            wrapped = name in _WRAPPED or (is_parallel and name == "module")
            yield from walk(child, prefix if wrapped else f"{prefix}{name}.")


def adapters_of(model: nn.Module) -> list[str]:
    """Names of the PEFT adapters of a model; none for what is no module."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    configs = (getattr(module, "peft_config", None) for module in modules)
    return sorted({name for config in configs if isinstance(config, dict) for name in config})


#: A parameter of a module: its name there, what is the same wherever the parameter is met again
#: (tied weights), the tensor and the global shape.
Registered = tuple[str, Hashable, Tensor, Shape]


def registered_parameters(module: nn.Module) -> Iterator[Registered]:
    """The parameters of a module itself, without its children's."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            # ZeRO-3 leaves a partitioned parameter with no elements.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            yield attribute, id(parameter), parameter, tuple(shape)


def take_inventory(
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    buffers: str = "copy",
    registered: Callable[[nn.Module], Iterable[Registered]] = registered_parameters,
) -> Inventory:
    """List and sort the tensors of ``model``.

    Args:
        include: shell-style patterns over names, of which a tensor must match one to be averaged.
            ``None``: all. A tied weight goes by any of its names.
        exclude: patterns of which it must match none.
        buffers: ``"average"`` treats floating-point buffers like parameters, ``"copy"`` lists
            all buffers apart, ``"ignore"`` leaves them out.
        registered: the parameters of one module.

    Raises:
        BindError: a parameter is on the meta device or has no elements, or none is left.
        ConfigError: a pattern matches nothing that can be averaged.
    """
    found = Inventory(model, adapters=adapters_of(model))
    parameters: dict[Hashable, Named] = {}
    for prefix, module in walk(model):
        refuse_lazy(prefix, module)
        for attribute, identity, parameter, shape in registered(module):
            fqn = prefix + attribute
            known = parameters.get(identity)
            parameters[identity] = (
                replace(known, aliases=(*known.aliases, fqn))
                if known
                else Named(fqn, module, attribute, parameter, shape)
            )
        for attribute, buffer in module._buffers.items():
            kept = buffers != "ignore" and attribute not in module._non_persistent_buffers_set
            if buffer is not None and kept:
                shape = tuple(buffer.shape)
                found.buffers.append(Named(prefix + attribute, module, attribute, buffer, shape))
    for named in parameters.values():
        if not named.tensor.requires_grad:
            found.frozen.append(named)
        elif _selected(named, include, exclude):
            found.averaged.append(named)
        else:
            found.excluded.append(named)
    for named in (*found.averaged, *found.frozen):
        refuse_unusable(named.fqn, named.tensor, named.shape)
    smooth = [b for b in found.buffers if buffers == "average" and b.tensor.is_floating_point()]
    every = [name for n in (*parameters.values(), *smooth) for name in (n.fqn, *n.aliases)]
    for pattern in (*(include or ()), *(exclude or ())):
        if not any(fnmatchcase(fqn, pattern) for fqn in every):
            raise ConfigError(
                f"pattern {pattern!r} matches no parameter; names look like {every[:3]}"
            )
    chosen = [b for b in smooth if _selected(b, include, exclude)]
    found.buffers = [b for b in found.buffers if b not in chosen]
    if not found.averaged:
        raise BindError(
            "no parameter to average: the model has "
            f"{len(parameters)} parameters, {len(found.frozen)} of them frozen "
            f"(requires_grad=False) and {len(found.excluded)} left out by include={include} "
            f"exclude={exclude}"
        )
    found.averaged += chosen
    warn_of_complex((named.fqn, named.tensor) for named in found.buffers)
    return found


def _selected(named: Named, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Whether the patterns select a tensor by any of its names."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(n, p) for n in (named.fqn, *named.aliases) for p in patterns)

    return (include is None or matches(include)) and not matches(exclude or ())


class ShardSource(ABC):
    """A model whose shards can be read, stored and, for a swap, overwritten.

    Attributes:
        kind: name of the layout, for messages.
        ranks: global ranks that share the model, in order; empty without a process group.
        inventory: the tensors of the model.
        shards: what this rank owns, one entry per averaged tensor on every rank.
    """

    kind: str
    ranks: list[int]
    inventory: Inventory
    shards: list[Shard]

    #: Names that are averaged on other ranks only, as those of other pipeline stages.
    elsewhere: frozenset[str] = frozenset()

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank writes what all ranks hold alike."""
        return not self.ranks or dist.get_rank() == self.ranks[0]

    def writes_whole(self, fqn: str) -> bool:
        """Whether of those that hold the tensor ``fqn`` whole this rank is the one to write it."""
        return self.is_first_rank

    @abstractmethod
    def live(self) -> list[Tensor]:
        """This rank's part of every averaged tensor, without copies, in the order of shards.

        Called at every update: parameters come as they are, because detaching a thousand of them
        takes longer than averaging them. Read them under ``no_grad``.
        """

    @abstractmethod
    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``tensors`` (shadows, in the order of shards) as what the checkpoint planner takes."""

    def extra_value(self, named: Named) -> Tensor:
        """A frozen parameter or a buffer as a value that is saved, but not loaded into."""
        writes = self.writes_whole(named.fqn)
        return whole(read(named).detach(), writes=writes, reads=False)

    #: Whether entering a swap needs every rank, so that an absent one must be named.
    swap_is_collective: bool = False
    #: Whether leaving it does, too.
    restore_is_collective: bool = False
    #: The DeepSpeed engine that trains the model, if there is one.
    engine: Any = None

    @abstractmethod
    def swap_targets(self) -> list[Tensor]:
        """The local tensors that a swap overwrites and that nothing else could restore."""

    @abstractmethod
    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the model with the average, of which this rank holds ``tensors``."""

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the model for good: with what it trains from, where that is another copy."""
        self.swap_in(tensors)

    def back_up(self) -> Backup:
        """Copies of what :meth:`restore` cannot make from anything else; never communicates."""
        return [(target, target.detach().clone()) for target in self.swap_targets()]

    def restore(self, backup: Backup) -> None:
        """Undo :meth:`swap_in`, exactly."""
        self.settle()
        copy_into([target for target, _ in backup], [original for _, original in backup])
        # Also what the body of a swap moved or replaced, if it still has its shape.
        for now, (before, original) in zip(self.swap_targets(), backup, strict=True):
            if now.data_ptr() != before.data_ptr():
                copy_into([now], [original])

    def overwritten(self) -> None:
        """See to it that what comes reads the parameters as they are now."""
        torch.clear_autocast_cache()  # the casts of a region that is around a swap
        # FSDP may gather on another stream than the one that copied.
        for device in {named.tensor.device for named in self.inventory.averaged}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def settle(self) -> None:  # noqa: B027 - most frameworks have nothing to do
        """Bring the registered parameters into their sharded form, if the framework has one."""

    def registered(self, named: Named) -> Tensor | None:
        """What the model has in the place of a parameter now."""
        return named.owner._parameters.get(named.attribute)

    def check_current(self) -> None:
        """Raise :class:`BindError` if what is being averaged is no longer a part of the model."""
        found = self.inventory
        names = {(id(module), prefix) for prefix, module in walk(found.model)}
        for named in (*found.averaged, *found.frozen, *found.buffers):
            held = isinstance(named.tensor, nn.Parameter)
            there = (id(named.owner), named.fqn.removesuffix(named.attribute)) in names
            if not there or (held and self.registered(named) is not named.tensor):
                raise BindError(
                    f"{'parameter' if held else 'buffer'} {named.fqn} was replaced after the "
                    "average was made (load_state_dict(assign=True), resizing, another submodule, "
                    "adapters around it); make the ShardedEMA after such changes"
                )

    def self_check(self) -> None:  # noqa: B027 - most frameworks hold a parameter only once
        """Check what this rank holds twice against each other; never communicates.

        Raises:
            BindError: the two contradict each other; the parameter is named.
        """

    def loose(self) -> dict[str, tuple[Box, Tensor]]:
        """Blocks that several ranks hold alike if the user's program keeps them so, by name."""
        return {}

    def agreement_record(self) -> dict[str, tuple[Box, str]]:
        """Blocks that must be equal wherever they lie, by parameter name, with their digests.

        The names are the same on all ranks; empty if nothing can differ.
        """
        return {name: (box, digest(tensor)) for name, (box, tensor) in self.loose().items()}

    def drift_record(self) -> dict[str, tuple[Box, str]]:
        """The same of a few elements of what is loose, to be looked at again in training."""
        return {
            name: (box, digest(tensor.detach().reshape(-1)[:: tensor.numel() // 64 + 1]))
            for name, (box, tensor) in self.loose().items()
        }

    def compare(self, records: Sequence[dict[str, tuple[Box, str]]]) -> None:
        """Compare the records of all ranks.

        Raises:
            BindError: they differ; the parameter and the rank are named.
        """
        refuse_differing(records)


def read_buffer(named: Named) -> Tensor:
    """The buffer as registered now: modules replace their buffers freely."""
    buffer = named.owner._buffers.get(named.attribute)
    if buffer is None:
        raise BindError(f"buffer {named.fqn} has been removed from the model")
    return buffer.detach()


def read(named: Named) -> Tensor:
    """The tensor now: a parameter is held (and returned as it is), a buffer looked up."""
    return named.tensor if isinstance(named.tensor, nn.Parameter) else read_buffer(named)


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensor by tensor, converting dtype and device."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@torch.no_grad()
def is_rounded(weights: Tensor, master: Tensor) -> bool:
    """Whether ``weights`` are ``master`` in their own dtype; NaN counts as equal to NaN."""
    rounded = master.to(weights.device, weights.dtype)
    return bool(((weights == rounded) | (weights.isnan() & rounded.isnan())).all())


def digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's elements in C order, as hex digits. Copies GPU tensors to the host."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_128_hexdigest(plain.view(torch.uint8).numpy().data)
