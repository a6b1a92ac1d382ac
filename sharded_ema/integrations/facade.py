"""What the facades share: the average behind names that a program knows already.

diffusers, timm and torch_ema hand over parameters, or a module, and keep lists of tensors. Here the
module that has the parameters is found, a :class:`~sharded_ema.ShardedEMA` is made of it, and lists
are filled from it and read into it by position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import GeneratorType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from sharded_ema.averaging.forgetting import share_left
from sharded_ema.averaging.schedules import Schedule
from sharded_ema.checkpoint.names import META_KEY
from sharded_ema.checkpoint.reading.manifest import decode_meta, encode_meta
from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.ema import ShardedEMA
from sharded_ema.errors import AbsentRankError, BindError, ConfigError, StateError
from sharded_ema.model.internals.deepspeed import is_of_an_engine
from sharded_ema.model.internals.fsdp1 import is_flattened
from sharded_ema.model.internals.pytorch import own_parameters
from sharded_ema.model.names import walk
from sharded_ema.model.pieces import pieces_of

#: What these libraries take for the parameters of a model.
Parameters = Iterable[Tensor] | nn.Module


class Law:
    """The decay that a facade computes itself, as a schedule.

    Args:
        decay_of: the decay of a step as the facade's library counts steps.
        describe: its type and settings in JSON types.
    """

    def __init__(
        self, decay_of: Callable[[int], float], describe: Callable[[], dict[str, Any]]
    ) -> None:
        self._decay_of = decay_of
        self._describe = describe
        self._ahead = 0

    def decay(self, n: int) -> float:
        """Decay of the ``n``-th update of the average behind the facade."""
        return self._decay_of(n + self._ahead)

    def to_dict(self) -> dict[str, Any]:
        """Type and settings, as stored in a checkpoint."""
        return self._describe()

    def is_at(self, n: int, step: int) -> None:
        """The ``n``-th update is that of step ``step`` of the facade, as are those around it."""
        self._ahead = step - n


class Keeper:
    """The average behind a facade.

    Args:
        schedule: of it.
        options: for :class:`~sharded_ema.ShardedEMA`.

    Attributes:
        ema: it; ``None`` until :meth:`make`.
        module: what it was made of, or what the facade was given first.
        names: of the parameters, in the order of the lists.
    """

    def __init__(self, schedule: Schedule, module: nn.Module, **options: Any) -> None:
        self.ema: ShardedEMA | None = None
        self.module = module
        self.options = options
        self._schedule = schedule
        self._given: list[Tensor] | None = None  # what the average is before it is made
        self.names = _names_of(module)
        self._own: set[int] = set()
        self._last: nn.Module | None = None  # that belongs to it, too

    def make(self) -> ShardedEMA:
        """Make the average of :attr:`module` as it is now; every rank comes.

        Raises:
            BindError: the module has no whole parameters any more.
        """
        self.ema = ShardedEMA(self.module, self._schedule, **self.options)
        # The ranks meet here once, so that one of them may later work alone where all hold all.
        self.ema.metrics(distance=True)
        self.names = self._names_now()
        self._own = {id(module) for module in self.module.modules()}
        return self.ema

    def remake(self, **options: Any) -> None:
        """Make it anew with other options, and go on with the same values; every rank comes."""
        if {**self.options, **options} == self.options:
            return
        self.options |= options
        if self.ema is not None:
            old = self.ema
            self.make().load_state_dict(old.state_dict())
            old.close()

    def follow(self, module: nn.Module, num_updates: int) -> ShardedEMA:
        """The average of a module, made if there is none, with the values that it had until then.

        Those are what :meth:`take` was given, or the parameters that the facade was made of.

        Args:
            num_updates: that they are the result of; at 0 the first update replaces them anyway.

        Raises:
            ConfigError: it is another module than the average was made of.
        """
        if self.ema is None:
            given, self._given = self._given, None
            before = list(self.module.parameters())
            if given is None and num_updates and all(map(is_plain, before)):
                given = [p.detach() for p in before]
            self.module = module
            ema = self.make()
            if given is not None:
                self.take(given, num_updates)
            return ema
        if not self.owns(module):
            raise ConfigError(
                f"the parameters belong to a {type(module).__name__} that is not the "
                f"{type(self.module).__name__} that is averaged; pass those of the model that "
                "trains, as accelerator.prepare() or the wrapper has returned it"
            )
        return self.ema

    def owns(self, module: nn.Module) -> bool:
        """Whether a module is the one that is averaged, inside it, or around it."""
        if self.ema is None:
            return False
        if module is self._last or id(module) in self._own:
            return True
        mine = {id(p) for p in self.module.parameters()}
        theirs = [id(p) for p in module.parameters()]
        around = any(child is self.module for child in module.modules())
        if around or (theirs and mine.issuperset(theirs)):
            self._last = module
            return True
        return False

    # ------------------------------------------------------------------ lists of tensors

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all of the average, and no other needs to come."""
        return self.ema is None or all(
            len(pieces) == 1 and pieces[0][1].shape == value.shape
            for value in self.ema.state_dict().values()
            for pieces in [pieces_of(value)]
        )

    def values(self, *, rank0_only: bool = False) -> list[Tensor]:
        """The average, a tensor for each parameter; collective unless :attr:`is_whole`.

        Args:
            rank0_only: other ranks get nothing where it has to be gathered.

        Raises:
            AbsentRankError: a rank did not come.
        """
        if self.ema is None:
            if self._given is not None:
                return self._given
            return [_require_plain(p.detach()) for p in self.module.parameters()]
        found = self._whole() if self.is_whole else self.gathered(rank0_only=rank0_only)
        return [found[name] for name in self.names] if found else []

    def _whole(self) -> dict[str, Tensor]:
        assert self.ema is not None
        found = {}
        for key, value in self.ema.state_dict().items():
            start, _, name = key.partition(".")
            if start in (DEFAULT_PROFILE, "_frozen"):
                found[name] = pieces_of(value)[0][1].detach()
        return found

    def gathered(self, *, rank0_only: bool) -> dict[str, Tensor]:
        """All of the average and what makes a whole model of it, by name. Collective.

        Raises:
            AbsentRankError: a rank did not come.
        """
        assert self.ema is not None
        try:
            return self.ema.full_state_dict(rank0_only=rank0_only)
        except AbsentRankError as error:
            raise AbsentRankError(
                "each rank keeps a part of this average, so every rank has to call this: take the "
                "call out of 'if accelerator.is_main_process:' (files are written by rank 0 alone "
                f"all the same), or wrap the model in DistributedDataParallel. {error}",
                error.failures,
            ) from error

    def _names_now(self) -> list[str]:
        """The module's own, unless a framework keeps its parameters elsewhere."""
        assert self.ema is not None
        known = {key.partition(".")[2] for key in self.ema.state_dict()}
        # FullyShardedDataParallel may have changed the order, and lists have the one they had.
        now = _names_of(self.module)
        inside = [name.removeprefix("module.") for name in now]  # an engine of DeepSpeed
        for names in (self.names, now, inside):
            if names and known.issuperset(names):
                return names
        raise BindError(
            f"the parameters of this {type(self.module).__name__} have no order of their own any "
            "more (FullyShardedDataParallel with use_orig_params=False); make this object from "
            "the parameters of the bare module"
        )

    def take(self, values: Sequence[Tensor], num_updates: int) -> None:
        """The average becomes these tensors, one for each parameter; no collective.

        Args:
            num_updates: updates that they are the result of.

        Raises:
            ConfigError: there are more or less of them than parameters.
            CheckpointMismatchError: shapes differ.
        """
        if len(values) != len(self.names):
            raise ConfigError(
                f"{len(values)} tensors were given for the average of {len(self.names)} parameters"
            )
        if self.ema is None:
            self._given = list(values)
        else:
            left = share_left(self._schedule, num_updates)
            self.take_named(dict(zip(self.names, values, strict=True)), num_updates, left)

    def take_named(self, values: Mapping[str, Tensor], num_updates: int, left: float) -> None:
        """The average becomes these tensors; what is not averaged is left alone; no collective.

        Args:
            left: the share of them that is the seed.

        Raises:
            CheckpointMismatchError: shapes differ.
        """
        assert self.ema is not None
        state = self.ema.state_dict()
        ((_, described),) = pieces_of(state[META_KEY])
        meta = decode_meta(described.numpy().tobytes(), META_KEY) | {
            "num_updates": num_updates,
            "applied_steps": num_updates,
            "seed_step": 0,
            "last_lerp_step": num_updates,
        }
        meta["profiles"][DEFAULT_PROFILE]["seed_weight"] = left
        data = encode_meta(meta)
        whole = torch.zeros(described.numel(), dtype=torch.uint8, device="cpu")
        whole[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        loaded = {f"{DEFAULT_PROFILE}.{name}": value for name, value in values.items()}
        averages = {
            key: _require_plain(value.detach()) for key, value in loaded.items() if key in state
        }
        self.ema.load_state_dict({**averages, META_KEY: whole}, strict=False)

    def unknown(self, names: Collection[str]) -> tuple[list[str], list[str]]:
        """Averaged names that some names lack, and those of them that the model does not have."""
        assert self.ema is not None
        state = self.ema.state_dict()
        ((_, described),) = pieces_of(state[META_KEY])
        aliases = decode_meta(described.numpy().tobytes(), META_KEY)["aliases"]
        known = {key.partition(".")[2] for key in state} | set(aliases)
        averaged = [key.partition(".")[2] for key in state if key.startswith(f"{DEFAULT_PROFILE}.")]
        return [n for n in averaged if n not in names], [n for n in names if n not in known]

    @torch.no_grad()
    def copy_into(self, targets: Sequence[Tensor]) -> None:
        """Fill plain tensors, one for each parameter; collective unless :attr:`is_whole`.

        Raises:
            ConfigError: there are more or less of them than parameters.
        """
        values = self.values()
        if len(values) != len(targets):
            raise ConfigError(
                f"{len(targets)} parameters were given for an average of {len(values)}"
            )
        for target, value in zip(targets, values, strict=True):
            _require_plain(target).data.copy_(value)


class Weights:
    """What ``store()`` keeps of a model's own weights until ``restore()``.

    Plain parameters are copied, as these libraries do. Sharded ones, and those of an engine, are
    put aside by a swap that ``copy_to()`` begins and ``restore()`` ends.

    Args:
        keeper: of the average.
        device: where copies lie; ``None`` for where the parameters are.
    """

    def __init__(self, keeper: Keeper, device: str | None = None) -> None:
        self._keeper = keeper
        self._device = device
        self.kept: list[Tensor] | None = None
        self._waiting = False
        self._swap: AbstractContextManager[None] | None = None

    @torch.no_grad()
    def store(self, parameters: Sequence[Tensor]) -> None:
        """Keep these weights."""
        if all(is_plain(p) for p in parameters):
            self.kept = [p.detach().to(self._device or p.device, copy=True) for p in parameters]
        else:
            self._waiting = True

    def copy_to(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        """Give the parameters of a module the average: of the one that trains, or of another."""
        keeper = self._keeper
        if keeper.ema is None or not keeper.owns(module):
            if keeper.ema is None or all(is_plain(p) for p in parameters):
                keeper.copy_into(parameters)
            else:
                keeper.ema.copy_to(module=module)
        elif self._swap is not None:
            return
        elif self._waiting:
            swap = keeper.ema.swap()
            swap.__enter__()
            self._swap = swap
        else:
            keeper.ema.copy_to()

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor]) -> None:
        """Give them back what was stored.

        Raises:
            RuntimeError: nothing was.
        """
        if self._swap is not None:
            swap, self._swap = self._swap, None
            self._waiting = False
            swap.__exit__(None, None, None)
        elif self.kept is not None:
            for kept, parameter in zip(self.kept, parameters, strict=True):
                parameter.data.copy_(kept)
        elif self._waiting:
            self._waiting = False
        else:
            raise RuntimeError("there are no stored weights to restore; call store() before")


def resolve(parameters: Parameters) -> tuple[nn.Module, list[Tensor]]:
    """The module that has some parameters, and these.

    ``Module.parameters()`` is a generator that knows its module. Of any other iterable a
    ``ParameterList`` is made.

    Raises:
        ConfigError: they are no parameters, or parts of what a framework keeps as a whole.
    """
    if isinstance(parameters, nn.Module):
        return parameters, list(parameters.parameters())
    if (
        isinstance(parameters, GeneratorType)
        and parameters.gi_code is nn.Module.parameters.__code__
    ):
        known = inspect.getgeneratorlocals(parameters)
        module = known.get("self")
        if isinstance(module, nn.Module) and known.get("recurse"):
            return module, list(parameters)
    found = list(parameters)
    strange = [type(p).__name__ for p in found if not isinstance(p, nn.Parameter)]
    if strange or not found:
        _refuse(f"holds {f'a {strange[0]}' if strange else 'nothing'}, and no parameters")
    taken = [p for p in found if not isinstance(p, DTensor) and not is_plain(p)]
    if taken:
        _refuse("holds parameters that FullyShardedDataParallel or DeepSpeed keeps elsewhere")
    return nn.ParameterList(found), found


def _refuse(why: str) -> NoReturn:
    raise ConfigError(
        f"of what was given for parameters no module is known, and it {why}; pass "
        "model.parameters() itself, as it is, of the model that trains (wrapped, if it is)"
    )


def is_plain(parameter: Tensor) -> bool:
    """Whether a parameter is all there, in a tensor that nobody else keeps for it."""
    if isinstance(parameter, DTensor) or is_of_an_engine(parameter):
        return False
    return not (isinstance(parameter, FlatParameter) or is_flattened(parameter))


def _require_plain(tensor: Tensor) -> Tensor:
    if not is_plain(tensor):
        raise StateError(
            "a whole tensor is needed here and there is a part of one: the model was sharded, and "
            "no step of its average was taken since. Call this after the first step, or of a "
            "model that is not sharded"
        )
    return tensor


def _names_of(module: nn.Module) -> list[str]:
    """Names of the parameters of a module in the order of ``parameters()``, without wrappers."""
    names: dict[int, str] = {}
    for prefix, part in walk(module):
        for name, parameter in own_parameters(part).items():
            if parameter is not None:
                names.setdefault(id(parameter), prefix + name)
    return list(names.values())
