"""What a framework must tell and do: two small protocols, one to read shards, one to stand in.

A source computes no average and keeps no copy of anything but for the time of a swap. Adding a
framework means one file beside this one: docs/extending.md shows how.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_ema.model.buffers import fill
from sharded_ema.model.inventory import Inventory, Named
from sharded_ema.model.layout import Box, FlatRange, Shape
from sharded_ema.model.steps import OptimizerSteps, StepHooks, StepListener

#: Tensors that a swap overwrites, each with a copy of what it held.
Backup = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What this rank owns of one averaged tensor: a flat range inside a box.

    Attributes:
        name: the tensor and its name.
        box: this rank's block of the global tensor.
        range: elements of the box that this rank averages, or ``None`` for all of them.
        order: dimensions from the outermost to the innermost in memory, if ``range`` counts in
            that order; ``None`` for C order.
        writes: whether this rank writes the piece into checkpoints; of equal copies in a stage one
            does.
    """

    name: Named
    box: Box
    range: FlatRange | None = None
    order: tuple[int, ...] | None = None
    writes: bool = True

    @property
    def shape(self) -> Shape:
        """Global shape."""
        return self.name.shape

    @property
    def numel(self) -> int:
        """Elements of the shadow on this rank."""
        return self.box.numel if self.range is None else self.range.numel


class Copy(NamedTuple):
    """A block that several ranks hold alike.

    Attributes:
        box: which block; equal blocks of one name must have equal elements.
        tensor: this rank's copy.
        synchronised: whether the framework keeps the copies equal in training, if they were equal
            once. Otherwise that is up to the user's program.
        over: what is held alike by the same ranks has the same value here.
    """

    box: Box
    tensor: Tensor
    synchronised: bool
    over: Hashable = None


class ReadsShards(Protocol):
    """Which tensors there are, and which part of each lies on this rank.

    Attributes:
        kind: name of the layout, for messages.
        ranks: global ranks that share the model, in order; empty without a process group.
        inventory: the tensors of the model.
        shards: what this rank owns, one for each averaged tensor.
        stage: those of them that are known to hold tensors of the same names, this one among them.
            Who holds what beside them is found out when all ranks meet.
        is_pipeline: whether the framework says that other ranks hold other tensors.
    """

    kind: str
    ranks: list[int]
    inventory: Inventory
    shards: list[Shard]
    stage: list[int]
    is_pipeline: bool

    def live(self) -> list[Tensor]:
        """This rank's part of every averaged tensor, without copies, in the order of shards.

        Called at every update: parameters come as they are, because detaching a thousand of them
        takes longer than averaging them. Read them under ``no_grad``. Must not communicate.
        """
        ...

    def stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``tensors``, shaped like :meth:`live`, as what the checkpoint planner takes."""
        ...

    def stored_apart(self, named: Named) -> Tensor:
        """A frozen parameter or a buffer as a value that is saved, but not loaded into."""
        ...

    def copies(self) -> Mapping[str, Copy]:
        """What several ranks hold alike, by name; empty if nothing can differ."""
        ...

    def self_check(self) -> None:
        """Check what this rank holds twice against each other; never communicates.

        Raises:
            BindError: the two contradict each other; the parameter is named.
        """
        ...


class StandsIn(Protocol):
    """How the average takes the place of the weights, and how these come back.

    Attributes:
        enters_together: whether entering a swap needs every rank, so that an absent one must be
            named.
        leaves_together: whether leaving it does, too.
    """

    enters_together: bool
    leaves_together: bool

    def settle(self) -> None:
        """Bring the model to rest: what is gathered is freed, the registered tensors are shards."""
        ...

    def back_up(self) -> Backup:
        """Copies of what :meth:`restore` cannot make from anything else; never communicates."""
        ...

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the model with the average, of which this rank holds ``tensors``."""
        ...

    def restore(self, backup: Backup) -> None:
        """Undo :meth:`swap_in`, exactly."""
        ...

    def overwrite(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the model for good: with what it trains from, where that is another copy."""
        ...


class FollowsSteps(Protocol):
    """What tells of applied optimizer steps."""

    def __call__(self, optimizers: Sequence[Any], listener: StepListener) -> StepHooks:
        """Follow the steps of what the user passed to ``attach()``."""
        ...

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether steps of a torch optimizer change what is averaged."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """A model as a framework has laid it out.

    Attributes:
        reader: its shards.
        stand_in: how the average takes their place.
        steps: what tells of applied optimizer steps.
        compute_devices: where the model computes, if its parameters may lie elsewhere (offload).
            Copies to there may be under way for longer than the call that began them.
    """

    reader: ReadsShards
    stand_in: StandsIn
    steps: FollowsSteps
    compute_devices: frozenset[torch.device] = frozenset()


@dataclass(frozen=True, slots=True)
class FollowsOptimizers:
    """The steps of a model that torch optimizers train.

    Attributes:
        inventory: whose averaged parameters the optimizers must own.
    """

    inventory: Inventory

    def __call__(self, optimizers: Sequence[Any], listener: StepListener) -> StepHooks:
        return OptimizerSteps(optimizers, self._parameters(), listener)

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether it owns an averaged parameter."""
        owned = (id(p) for group in optimizer.param_groups for p in group["params"])
        return not self._parameters().keys().isdisjoint(owned)

    def _parameters(self) -> dict[int, str]:
        return {id(n.tensor): n.fqn for n in self.inventory.averaged if n.is_parameter}


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensor by tensor, converting dtype and device."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _nothing() -> None:
    pass


class InPlace:
    """Stands in by overwriting the tensors that training reads, from copies that undo it.

    Args:
        targets: those tensors, in the order of shards.
        fill: overwrites targets with an average, of which this rank holds the given tensors.
        settle: brings the model to rest; most frameworks have nothing to do.
        together: whether ``fill`` communicates.
    """

    leaves_together = False

    def __init__(
        self,
        targets: Callable[[], list[Tensor]],
        fill: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = copy_into,
        *,
        settle: Callable[[], None] = _nothing,
        together: bool = False,
    ) -> None:
        self._targets = targets
        self._fill = fill
        self.settle = settle
        self.enters_together = together

    def back_up(self) -> Backup:
        return back_up(self._targets())

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        self._fill(self._targets(), tensors)

    def restore(self, backup: Backup) -> None:
        try:
            self.settle()
        finally:
            put_back(backup, self._targets)

    def overwrite(self, tensors: Sequence[Tensor]) -> None:
        self.swap_in(tensors)


def back_up(targets: Sequence[Tensor]) -> Backup:
    """The targets with copies of what they hold."""
    return [(target, target.detach().clone()) for target in targets]


def put_back(backup: Backup, targets: Callable[[], list[Tensor]]) -> None:
    """Write copies back, then also to what the body of a swap moved or replaced meanwhile.

    Args:
        targets: what stands in the place of the backup's targets now; may raise.
    """
    for target, original in backup:
        fill(target, original)
    for now, (before, original) in zip(targets(), backup, strict=True):
        if now.data_ptr() != before.data_ptr() or now.stride() != before.stride():
            fill(now, original)
