"""DeepSpeed engines: ZeRO 1, 2 and 3, and replicas without ZeRO; pipelines included.

With ZeRO each rank averages its partition of the fp32 master weights. Without it, in 16-bit, the
optimizer keeps an fp32 master of each parameter on every rank, and the replicas share the work; in
fp32 it trains the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_ema.errors import (
    BindError,
    OptimizerError,
    StateError,
    UnsupportedLayoutError,
    warn,
)
from sharded_ema.model.internals.deepspeed import (
    PARTITIONED,
    Partition,
    Partitions,
    ReplicatedMasters,
    Stage,
    check_engine,
    inner_optimizers,
    is_engine,
    is_expert,
    is_in_pieces,
    module_of,
    partitions_of,
    piece_of,
    piece_weights,
    trained_parameters,
)
from sharded_ema.model.inventory import Inventory, Named, Selection, take_inventory
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import FlatShard, range_pieces, whole
from sharded_ema.model.sources.protocol import (
    Backup,
    Copy,
    Shard,
    Source,
    back_up,
    copy_into,
    put_back,
)
from sharded_ema.model.sources.replicas import Shares, stored_shard, whole_copy
from sharded_ema.model.steps import MethodWrap, StepHooks, StepListener

# How far weight decay may have moved a master; weights that were loaded behind it are further off.
_DECAYED = 2.0**-6


def recognises(target: object) -> bool:
    """Whether something is what ``deepspeed.initialize`` returns."""
    return is_engine(target)


def make_source(target: nn.Module, selection: Selection, *, shard_replicas: bool) -> Source:
    """The source of an engine, by the class of its optimizer.

    Raises:
        UnsupportedLayoutError: DeepSpeed's version, its optimizer, or something else of the engine
            is not supported; the message names it.
        BindError: a parameter cannot be averaged.
    """
    engine: Any = target
    check_engine(engine)
    inventory = take_inventory(module_of(engine), selection)
    inventory.is_settled = True
    _refuse_experts(inventory)
    _refuse_complex(inventory)
    _set_aside_untrained(inventory, trained_parameters(engine.optimizer))
    steps, devices = FollowsEngine(engine), frozenset({engine.device})
    if type(engine.optimizer).__name__ in PARTITIONED:
        shards = PartitionedShards(engine, partitions_of(engine), inventory)
        return Source(shards, PartitionedStandIn(shards), steps, devices)
    masters = MasterShards(engine, inventory, shard_replicas=shard_replicas)
    return Source(masters, MasterStandIn(masters), steps, devices)


def _refuse_experts(inventory: Inventory) -> None:
    for named in (*inventory.averaged, *inventory.frozen, *inventory.excluded):
        if is_expert(named.tensor):
            raise UnsupportedLayoutError(
                f"parameter {named.fqn} is an expert of DeepSpeed's MoE, which is not supported"
            )


def _refuse_complex(inventory: Inventory) -> None:
    for named in inventory.averaged:
        if named.is_parameter and named.tensor.is_complex():
            raise UnsupportedLayoutError(
                f"parameter {named.fqn} is complex, of which DeepSpeed has no masters; keep it as "
                "two real parameters, or as one with a last dimension of 2 (torch.view_as_real)"
            )


def _set_aside_untrained(inventory: Inventory, trained: set[int]) -> None:
    """Treat as frozen what no parameter group holds, because it never moves."""
    idle = [n for n in inventory.averaged if n.is_parameter and id(n.tensor) not in trained]
    if not idle:
        return
    inventory.averaged = [n for n in inventory.averaged if n not in idle]
    inventory.frozen += idle
    names = [n.fqn for n in idle]
    if not any(named.is_parameter for named in inventory.averaged):
        raise BindError(
            f"the engine's optimizer holds none of the {len(names)} trainable parameters, among "
            f"them {names[:3]}; pass model_parameters to deepspeed.initialize"
        )
    warn(
        f"{len(names)} trainable parameters are in no parameter group of the engine, among them "
        f"{names[:3]}; they never move and are stored as frozen ones are"
    )


@torch.no_grad()
def _is_rounded(weights: Tensor, master: Tensor) -> bool:
    """Whether ``weights`` are ``master`` in their own dtype; NaN counts as equal to NaN."""
    rounded = master.to(weights.device, weights.dtype)
    return bool(((weights == rounded) | (weights.isnan() & rounded.isnan())).all())


# ---------------------------------------------------------------------- ZeRO 1, 2 and 3


class PartitionedShards:
    """Each rank averages its partition of the master weights.

    :meth:`self_check` compares every slice of the masters with the parameter that it is said to
    belong to, so that a changed layout is refused and never averaged. No shard covers padding.

    Args:
        engine: a DeepSpeed engine.
        partitions: its optimizer's.
        inventory: the tensors of its module.
    """

    def __init__(self, engine: Any, partitions: Partitions, inventory: Inventory) -> None:
        self._optimizer = type(engine.optimizer).__name__
        self.kind = partitions.kind
        self.partitions = partitions
        self.inventory = inventory
        self._stage = Stage(engine)
        self.ranks = self._stage.ranks
        self.stage, self.is_pipeline = self._stage.peers, self._stage.is_pipeline
        layout = partitions.layout()
        self.places = [
            layout[id(named.tensor)] if named.is_parameter else None for named in inventory.averaged
        ]
        self.shards = [
            self._shard(named, place)
            for named, place in zip(inventory.averaged, self.places, strict=True)
        ]
        self._pointers: list[int] = []
        self._views: list[Tensor] = []

    def _shard(self, named: Named, place: Partition | None) -> Shard:
        box = Box.whole(named.shape)
        if place is None:
            return Shard(named, box, writes=self._stage.leads)
        return Shard(named, box, place.range)

    def live(self) -> list[Tensor]:
        masters = self.partitions.masters()
        pointers = [master.data_ptr() for master in masters]
        if pointers != self._pointers:
            self._views = [self._view(i, masters) for i in range(len(self.shards))]
            self._pointers = pointers
        if all(self.places):
            return self._views
        # Only averaged buffers must be looked up every time.
        return [
            view if place else shard.name.read()
            for shard, place, view in zip(self.shards, self.places, self._views, strict=True)
        ]

    def _view(self, index: int, masters: Sequence[Tensor]) -> Tensor:
        place, named = self.places[index], self.shards[index].name
        if place is None:
            return named.read()
        master, span = masters[place.buffer].detach(), place.range
        if not span.numel:
            return master.new_empty(0)
        if master.numel() < place.offset + span.numel:
            raise StateError(
                f"the master weights of parameter {named.fqn} are not in memory; call "
                "engine.reload_states() before the next step or use of the average"
            )
        return master.narrow(0, place.offset, span.numel)

    def stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            whole(tensor, writes=shard.writes)
            if shard.range is None
            else stored_shard(shard, tensor)
            for shard, tensor in zip(self.shards, tensors, strict=True)
        ]

    def stored_apart(self, named: Named) -> Tensor:
        if not is_in_pieces(named.tensor):
            return whole(named.read().detach(), writes=self._stage.leads, reads=False)
        shape, piece = named.shape, piece_weights(named.tensor)
        return FlatShard(
            shape,
            range_pieces(Box.whole(shape), piece_of(named.tensor), piece),
            dtype=piece.dtype,
            device=piece.device,
            reads=False,
        )

    def copies(self) -> Mapping[str, Copy]:
        return {}  # DeepSpeed keeps equal what it replicates

    def pieces(self) -> Iterator[tuple[int, Tensor, Partition]]:
        """Position, parameter and place of everything of which this rank holds elements."""
        for index, (shard, place) in enumerate(zip(self.shards, self.places, strict=True)):
            if place is not None and place.range.numel:
                yield index, shard.name.tensor, place

    @torch.no_grad()
    def self_check(self) -> None:
        live = self.live()
        for index, parameter, place in self.pieces():
            seen = self.partitions.seen(parameter, place)
            if not _is_rounded(seen, live[index]):
                raise BindError(
                    f"the weights of parameter {self.shards[index].name.fqn} are not the "
                    f"{live[index].dtype} masters of {self._optimizer} in {seen.dtype}: either the "
                    "weights were changed behind DeepSpeed's back (load them before "
                    "deepspeed.initialize, or with engine.load_checkpoint), or this version of "
                    "DeepSpeed lays out its partitions in a way that is not known here"
                )


class PartitionedStandIn:
    """Overwrites this rank's piece of the weights and lets DeepSpeed gather.

    Masters stay as they are, and the weights come back from them. So there is no backup but of
    averaged buffers, and of masters that are the weights themselves.
    """

    enters_together = True
    leaves_together = True

    def __init__(self, shards: PartitionedShards) -> None:
        self._shards = shards
        self._partitions = shards.partitions

    def settle(self) -> None:
        pass  # gathered copies are dropped when pieces change

    def _buffers(self) -> list[Tensor]:
        pairs = zip(self._shards.shards, self._shards.places, strict=True)
        return [shard.name.read() for shard, place in pairs if place is None]

    def _targets(self) -> list[Tensor]:
        """What a swap overwrites and no master could bring back."""
        live = self._shards.live()
        # Plain fp32 training may have masters that are the weights.
        aliased = [
            live[index]
            for index, parameter, place in self._shards.pieces()
            if live[index].data_ptr() == self._partitions.weights(parameter, place).data_ptr()
        ]
        return [*self._buffers(), *aliased]

    def back_up(self) -> Backup:
        # What is restored are the masters, rounded; so that must be what is there now.
        self._shards.self_check()
        return back_up(self._targets())

    @torch.no_grad()
    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        def write() -> None:
            self._write(tensors)
            pairs = zip(tensors, self._shards.places, strict=True)
            copy_into(self._buffers(), [t for t, place in pairs if place is None])

        self._partitions.rewrite(write)

    def _write(self, tensors: Sequence[Tensor]) -> None:
        for index, parameter, place in self._shards.pieces():
            self._partitions.weights(parameter, place).copy_(tensors[index])

    def restore(self, backup: Backup) -> None:
        put_back(backup, self._targets)
        self._refresh()

    def overwrite(self, tensors: Sequence[Tensor]) -> None:
        copy_into(self._shards.live(), tensors)
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        # DeepSpeed's own refresh would take all weights back, also those that another average of
        # the model stands in for.
        self._partitions.rewrite(lambda: self._write(self._shards.live()))


# ---------------------------------------------------------------------- without ZeRO


class MasterShards:
    """Each replica averages a slice of the masters, or of the parameters where they are one.

    Args:
        engine: a DeepSpeed engine.
        inventory: the tensors of its module.
        shard_replicas: see :class:`Shares`.
    """

    kind = "zero-0"

    def __init__(self, engine: Any, inventory: Inventory, *, shard_replicas: bool) -> None:
        self._optimizer = type(engine.optimizer).__name__
        self._masters = ReplicatedMasters(engine)
        self._stage = Stage(engine)
        self.ranks = self._stage.ranks
        self.stage, self.is_pipeline = self._stage.peers, self._stage.is_pipeline
        self.inventory = inventory
        groups = (self._stage.replicas,)
        self.shares = Shares(
            inventory,
            [whole_copy(named, groups) for named in inventory.averaged],
            inventory.averaged_now(),
            shard_replicas=shard_replicas,
        )
        self.shards = self.shares.shards

    def master(self, index: int) -> Tensor:
        """What the optimizer trains for the parameter at ``index``, whole."""
        named = self.inventory.averaged[index]
        found = self._masters.of(named.tensor)
        return named.read() if found is None else found

    def masters(self) -> list[Tensor]:
        """What the optimizer trains, whole."""
        return [self.master(index) for index in range(len(self.shards))]

    def is_copy(self, index: int) -> bool:
        """Whether the weights are the masters, rounded, and can be made from them again."""
        tensor = self.inventory.averaged[index].tensor
        master = self._masters.of(tensor)
        return master is not None and _is_rounded(tensor, master)

    def live(self) -> list[Tensor]:
        return self.shares.cut(self.masters())

    def stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.shares.stored(tensors)

    def stored_apart(self, named: Named) -> Tensor:
        return whole(named.read().detach(), writes=self._stage.leads, reads=False)

    def copies(self) -> Mapping[str, Copy]:
        return {}  # DeepSpeed keeps equal what it replicates

    @torch.no_grad()
    def self_check(self) -> None:
        for index, named in enumerate(self.inventory.averaged):
            # Not equal at the very start: to make its state the optimizer takes one step without
            # gradients, whose weight decay reaches the masters and not yet the weights (0.19.8).
            seen, master = named.read().float(), self.master(index).float()
            if not torch.allclose(seen, master, rtol=_DECAYED, atol=_DECAYED, equal_nan=True):
                raise BindError(
                    f"the weights of parameter {named.fqn} are not the masters of "
                    f"{self._optimizer} in {named.tensor.dtype}: load weights before "
                    "deepspeed.initialize, or with engine.load_checkpoint"
                )


class MasterStandIn:
    """Overwrites the weights; those that are masters, rounded, come back from these."""

    leaves_together = False

    def __init__(self, shards: MasterShards) -> None:
        self._shards = shards
        self._copies: set[int] = set()
        self.enters_together = shards.shares.together

    def settle(self) -> None:
        pass  # nothing is ever gathered

    def _weights(self) -> list[Tensor]:
        return self._shards.inventory.averaged_now()

    def _targets(self) -> list[Tensor]:
        return [t for i, t in enumerate(self._weights()) if i not in self._copies]

    def back_up(self) -> Backup:
        self._copies = {i for i in range(len(self._shards.shards)) if self._shards.is_copy(i)}
        return back_up(self._targets())

    def swap_in(self, tensors: Sequence[Tensor]) -> None:
        self._shards.shares.fill(self._weights(), tensors)

    def restore(self, backup: Backup) -> None:
        put_back(backup, self._targets)
        self._refresh(self._copies)

    def overwrite(self, tensors: Sequence[Tensor]) -> None:
        self._shards.shares.fill(self._shards.masters(), tensors)
        self._refresh(range(len(self._shards.shards)))

    @torch.no_grad()
    def _refresh(self, indices: Iterable[int]) -> None:
        """Make weights from their masters again."""
        weights = self._weights()
        for index in indices:
            weights[index].copy_(self._shards.master(index))


# ---------------------------------------------------------------------- steps


class FollowsEngine:
    """The steps of a model that an engine trains.

    Args:
        engine: a DeepSpeed engine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __call__(self, optimizers: Sequence[Any], listener: StepListener) -> StepHooks:
        own = {id(o) for o in (self._engine, *inner_optimizers(self._engine))}
        own.add(id(self._engine.optimizer))
        for given in optimizers:  # accelerate wraps what the engine has
            if own.isdisjoint((id(given), id(getattr(given, "optimizer", given)))):
                raise OptimizerError(
                    f"a DeepSpeed engine knows its own optimizer, which a {type(given).__name__} "
                    "is not: call attach() without arguments, or pass the engine"
                )
        return EngineSteps(self._engine, listener)

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether it is the engine's, which trains masters of the averaged parameters."""
        return any(optimizer is inner for inner in inner_optimizers(self._engine))


class EngineSteps:
    """Tells once of every step that a DeepSpeed engine has applied.

    Neither sign alone is enough. ``engine.was_step_applied()`` is false between accumulation
    boundaries and on overflow, but true when a ``GradScaler`` (``torch_autocast`` in fp16) skipped
    the step. The hooks of the optimizer inside tell the two apart, but run once per parameter
    group and before the model has its new weights.

    Args:
        engine: a DeepSpeed engine; of a pipeline engine ``train_batch`` is followed.
        listener: who is told.
    """

    def __init__(self, engine: Any, listener: StepListener) -> None:
        self.trainer = engine
        self.skipped_steps = 0
        self._listener = listener
        self._stepped = False
        self._handles = [
            optimizer.register_step_post_hook(self._post) for optimizer in inner_optimizers(engine)
        ]
        # The step() of a pipeline engine only raises.
        name = "train_batch" if hasattr(engine, "is_pipe_parallel") else "step"
        self._wrap: MethodWrap | None = MethodWrap(engine, name, self._around_step)

    def _post(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._stepped = True

    def _around_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._listener.before()
        self._stepped = False
        skipped = self.trainer.skipped_steps
        result = original(*args, **kwargs)
        applied = self.trainer.was_step_applied()
        if applied and (self._stepped or not self._handles):
            self._listener.applied()
        elif applied or self.trainer.skipped_steps > skipped:
            self.skipped_steps += 1
        return result

    def end_round(self) -> None:
        pass  # an engine steps all its parameters at once

    def remove(self) -> None:
        if self._wrap is None:
            return
        self._wrap.remove()
        self._wrap = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._listener.removed()
