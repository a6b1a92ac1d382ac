"""The model that an average follows: its shards, its optimizer's steps, and what stands in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_ema.errors import AbsentRankError, BindError, EMAError, StateError, SwapError
from sharded_ema.model.adapters import merged_layers
from sharded_ema.model.agreement import Ranks, collective
from sharded_ema.model.buffers import HeldBuffers, running_statistics
from sharded_ema.model.devices import is_accelerator, is_capturing, wait_for
from sharded_ema.model.holdings import (
    Digests,
    Holdings,
    Record,
    Tensors,
    compare,
    digest_of,
    take_stock,
)
from sharded_ema.model.internals.pytorch import local_tensor, unchanged
from sharded_ema.model.inventory import Inventory, Named
from sharded_ema.model.sources.protocol import Backup, ReadsShards, Source
from sharded_ema.model.standing import StandingIn
from sharded_ema.model.steps import StepHooks, StepListener, StepWatch
from sharded_ema.model.world import is_first_of_strangers

#: Tells what must be the same on all ranks, by what to call it.
Alike = Callable[[], Mapping[str, Any]]


class FollowedModel:
    """A model of several ranks, as one average sees it.

    Args:
        source: its shards, and how another set of weights takes their place.
        timeout: seconds to wait for a rank before it counts as absent.

    Attributes:
        reader: its shards.
        ranks: where its ranks meet.
        names: of the averaged tensors on this rank.
        standing_in: name of the average that stands in for the weights, if one does.
        backup_bytes: memory that the weights take meanwhile.
    """

    # What a copy does not share: it is attached to nothing.
    not_copied = ("_steps", "_standing")
    _steps: StepHooks | None = None
    _standing: StandingIn | None = None

    def __init__(self, source: Source, timeout: float) -> None:
        self._source = source
        self._stand_in = source.stand_in
        self.reader: ReadsShards = source.reader
        self.names = [shard.name.fqn for shard in self.reader.shards]
        self.ranks = Ranks(self.reader.ranks, timeout)
        self.standing_in: str | None = None
        self.backup_bytes = 0
        self._holdings: Holdings | None = None
        self._lost: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.not_copied}

    def refuse_copies(self) -> None:
        """Refuse to copy or pickle what belongs to several ranks, or stands in for weights.

        Raises:
            StateError: the model is spread over ranks, or wrapped for that.
            SwapError: an average stands in for the weights.
        """
        self.refuse_in_swap("copying or pickling the ShardedEMA")
        if self.reader.ranks and (self.ranks.size > 1 or self.reader.kind != "plain"):
            raise StateError(
                "a ShardedEMA of a model that is wrapped for several ranks cannot be copied or "
                "pickled: each rank has its part, and meets the others in process groups. Save it "
                "with ema.save(), and load it into the ShardedEMA of the other model"
            )

    @property
    def inventory(self) -> Inventory:
        """Its tensors."""
        return self.reader.inventory

    def live(self) -> list[Tensor]:
        """This rank's part of every averaged tensor, without copies."""
        return self.reader.live()

    def weights(self) -> list[Tensor]:
        """What only optimizer steps should change: not the buffers that are averaged."""
        live = self.live()
        return [live[i] for i in self.weights_at]

    @cached_property
    def weights_at(self) -> list[int]:
        """Positions of these among the averaged tensors."""
        return [i for i, shard in enumerate(self.reader.shards) if shard.name.is_parameter]

    def statistics(self) -> list[Tensor]:
        """Running statistics, as of BatchNorm, that are not averaged."""
        found = [named.read() for named in running_statistics(self.inventory.buffers)]
        return [local_tensor(t) if isinstance(t, DTensor) else t for t in found]

    @property
    def counted_here(self) -> list[int]:
        """Positions of what this rank counts in a sum over all ranks; equal copies count once."""
        borrowed = self.holdings.borrowed
        return [
            i
            for i, shard in enumerate(self.reader.shards)
            if shard.writes and shard.name.fqn not in borrowed
        ]

    # ------------------------------------------------------------------ steps

    @property
    def steps(self) -> StepHooks | None:
        """What tells of applied steps; ``None`` while nothing is attached."""
        return self._steps

    def attach(self, optimizers: Sequence[Any], listener: StepListener, alike: Alike) -> StepHooks:
        """Follow the steps of optimizers, or of the engine that trains the model. Collective.

        Args:
            alike: what must be the same on all ranks.

        Raises:
            StateError: steps are followed already.
            EMAError: the model contradicts itself, or the ranks differ; on all of them.
        """
        if self._steps is not None:
            raise StateError("already attached; call remove() on the first handle before")

        def bind() -> None:
            self.settle()  # of a model that was wrapped since then the optimizer is not to blame
            self._steps = self._source.steps(optimizers, listener)

        try:
            self._meet(bind, "ema.attach()", alike)
        except EMAError:
            if self._steps is not None:
                self._steps.remove()
            raise
        assert self._steps is not None
        return self._steps

    def watch(self, call: Callable[[], None]) -> StepWatch:
        """Have a method called before every step of an optimizer of the averaged parameters."""
        return StepWatch(self._source.steps.trains, call)

    @property
    def is_recorded(self) -> bool:
        """Whether a stream records what is done now in a graph, instead of computing it."""
        return any(is_capturing(device) for device in self._accelerators)

    def refuse_capture(self) -> None:
        """Refuse an update that a stream would record instead of computing.

        Raises:
            StateError: see above.
        """
        if self.is_recorded:
            raise StateError(
                "an update was called while the current stream records a graph: replayed, it would "
                "repeat the decay of this step and count none. Make the ShardedEMA with "
                "capturable=True; or keep the update out of the capture (detach the optimizer "
                "whose step is captured) and call ema.update() after each replay"
            )

    @cached_property
    def _accelerators(self) -> list[torch.device]:
        found = {named.tensor.device for named in self.inventory.averaged}
        return [device for device in found if is_accelerator(device)]

    def detached(self) -> None:
        """The steps are no longer followed."""
        self._steps = None

    # ------------------------------------------------------------------ meeting

    def meet(self) -> None:
        """Refuse, on all ranks, a model that contradicts itself or differs between them; once."""
        if self._holdings is None:
            self._meet(lambda: None, "the first agreement of all ranks", dict)

    def _meet(self, bind: Callable[[], None], purpose: str, alike: Alike) -> None:
        """Do ``bind`` on every rank; if it fails on one, all raise. Then compare what they hold."""

        def verdict() -> Digests | None:
            bind()
            if self._holdings is not None:
                return None
            self.reader.self_check()
            return take_stock(self.reader)

        answers = self.ranks.agree(verdict, purpose, alike)
        if self._holdings is None:
            self._holdings = compare(self.reader, self.ranks, [a for a in answers if a])

    @property
    def holdings(self) -> Holdings:
        """What the ranks hold, as far as this one knows: until they have met, what it holds."""
        return self._holdings or Holdings(Tensors.of(self.inventory))

    def not_shared(self) -> Iterator[tuple[str, str]]:
        """Signs that each rank works for itself: topics and messages of warnings."""
        if is_first_of_strangers():
            yield (
                "no process group",
                "this process is one of several that a launcher has started, and there is no "
                "process group: each keeps an average of its own, and their saves to one path meet "
                "each other. Call torch.distributed.init_process_group() before the model is "
                "wrapped",
            )
        met = self._holdings is not None and self.ranks.size > 1
        is_plain = met and self.reader.kind == "plain"
        if is_plain and self.holdings.tensors.held == Tensors.of(self.inventory).held:
            yield (
                "not shared",
                f"the model is a plain module on each of {self.ranks.size} ranks, so that each "
                "keeps the whole average. If DistributedDataParallel or fully_shard wraps it, "
                "make the ShardedEMA of what they return: each rank then keeps its share",
            )

    def drift_record(self) -> Record:
        """A few elements of what the user's program must keep equal, to be compared in training."""
        if self.ranks.size == 1:
            return {}
        return {
            name: (c.box, digest_of(c.tensor.detach().reshape(-1)[:: c.tensor.numel() // 64 + 1]))
            for name, c in self.reader.copies().items()
            if not c.synchronised
        }

    # ------------------------------------------------------------------ standing in

    def settle(self) -> None:
        """Bring the model to rest, and make sure that it still has what is averaged.

        All ranks must, or none: the next forward gathers again what was freed here.

        Raises:
            BindError: a tensor was replaced.
            SwapError: by another average, which stands in for what is no average here.
        """
        self._stand_in.settle()
        self.inventory.check_current()
        for other in StandingIn.others(self._standing):
            apart = other.replaced((*self.inventory.frozen, *self.inventory.buffers))
            self._refuse("using an average that stores it as it is", other, apart)

    def refuse_in_swap(self, what: str) -> None:
        """Refuse something that needs the weights themselves.

        Raises:
            SwapError: an average stands in for them, this one or another of the same weights.
        """
        if self.standing_in is not None:
            raise SwapError(
                f"{what} is not allowed while the average {self.standing_in!r} stands in for the "
                "parameters; leave the swap() block first"
            )
        self.refuse_in_other_swap(what)

    def refuse_in_other_swap(self, what: str) -> None:
        """Refuse something that needs the weights, if another average of the same ones is there.

        Raises:
            SwapError: see above.
        """
        for other in StandingIn.others(self._standing):
            self._refuse(what, other, other.replaced_of(self, self.inventory.averaged))

    def refuse_elsewhere(self, what: str, tensors: Sequence[Named]) -> None:
        """Refuse to write into another model for which an average stands in.

        Raises:
            SwapError: see above.
        """
        for other in StandingIn.others(None):
            self._refuse(what, other, other.replaced(tensors))

    def _refuse(self, what: str, other: StandingIn, names: list[str]) -> None:
        if names:
            raise SwapError(
                f"{what} is not allowed while the average {other.name!r} of another ShardedEMA "
                f"stands in for {_some(names)}; leave its swap() block first"
            )

    @property
    def is_itself(self) -> bool:
        """Whether no average stands in for its weights, neither this one nor another of them."""
        return self.standing_in is None and not any(
            other.replaced_of(self, self.inventory.averaged)
            for other in StandingIn.others(self._standing)
        )

    def require_whole(self) -> None:
        """Refuse a model that holds an average for good, since a rank was lost.

        Raises:
            StateError: see above.
        """
        if self._lost is not None:
            raise StateError(f"this average cannot be used: {self._lost}")

    @contextmanager
    def replaced(
        self,
        name: str,
        average: Callable[[], Sequence[Tensor]],
        prepare: Callable[[], None],
        alike: Alike,
    ) -> Iterator[None]:
        """Let an average stand in for the weights, and put these back exactly.

        Args:
            name: of the average.
            average: this rank's part of it, asked for once all is prepared.
            prepare: what must be done on every rank before; if it fails on one, all raise.
            alike: what must be the same on all ranks, where they meet for it.

        Raises:
            SwapError: adapters are merged; or, where leaving is collective, another rank left with
                an exception.
            AbsentRankError: a rank did not come to a collective entry or exit.
        """
        backup: Backup = []
        held: list[HeldBuffers] = []

        def back_up() -> None:
            prepare()
            self._refuse_merged("swap()")
            backup.extend(self._stand_in.back_up())
            held.append(HeldBuffers(self.inventory))

        self._together(back_up, "ema.swap()", lambda: {"profile": name, **alike()})
        (buffers,) = held
        self.backup_bytes = sum(copy.numel() * copy.element_size() for _, copy in backup)
        self.backup_bytes += buffers.num_bytes
        kept = unchanged([*(target for target, _ in backup), *buffers.tensors])
        self.standing_in = name
        self._standing = StandingIn(name, self.inventory.averaged)
        failure: BaseException | None = None
        try:
            self._come_to_rest()
            with collective("ema.swap()"):
                self._stand_in.swap_in(average())
            self._come_to_rest()
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self._put_back(backup, buffers, kept, failure)

    def _put_back(
        self,
        backup: Backup,
        buffers: HeldBuffers,
        kept: AbstractContextManager[None],
        failure: BaseException | None,
    ) -> None:
        if sys.is_finalizing():
            return  # nobody computes with these weights any more, and nobody else may come
        failures: dict[int, str] = {}
        if self._stand_in.leaves_together:
            own = None if failure is None else f"{type(failure).__name__}: {failure}"
            try:
                answers = self.ranks.gather(own, "the end of ema.swap()")
            except AbsentRankError:
                self.standing_in = None
                self._lost = (
                    "a rank was lost in swap(), and the model still holds the average; restart "
                    "from a checkpoint"
                )
                raise
            failures = {rank: text for rank, text in enumerate(answers) if text is not None}
        try:
            self._come_to_rest()
            with kept:  # a forward before the swap may have its backward after it
                self._stand_in.restore(backup)
                buffers.put_back()
        finally:
            self._come_to_rest()
            if self._standing is not None:
                self._standing.end()
            self._standing = None
            self.standing_in = None
            self.backup_bytes = 0
        if failures and failure is None:
            rank = min(failures)
            raise SwapError(
                f"rank {rank} left the swap() block with {failures[rank]}; the parameters are "
                "restored on all ranks",
                failures,
            )
        self._check_left(failure)

    def _refuse_merged(self, what: str) -> None:
        """Refuse to write weights that merged adapters do not read."""
        merged = merged_layers(self.inventory)
        if merged:
            raise SwapError(
                f"{what} is not allowed while adapters are merged, as in {_some(merged)}: the "
                "model computes with its base weights, to which the adapters were added, and would "
                "not see the average. Unmerge them first (unmerge_adapter() of PEFT, train() of "
                "loralib)"
            )

    def _check_left(self, failure: BaseException | None) -> None:
        """Say what a swap has left in the model that nothing here can put back.

        Args:
            failure: what the block was left with, which then is told of it.
        """
        found: EMAError | None = None
        merged = merged_layers(self.inventory)
        if merged:
            found = SwapError(
                "adapters were merged inside the swap() block and are still, as in "
                f"{_some(merged)}: the averaged parameters are restored, but the base weights hold "
                "the adapters of the average, and unmerging would now take others out. Load the "
                "base weights again, and unmerge before the block ends"
            )
        else:
            try:
                self.inventory.check_current()
            except BindError as error:
                found = BindError(
                    "the swap() block has changed the model, which may hold the average where its "
                    f"weights could not be put back: {error}"
                )
        if found is not None and failure is None:
            raise found
        if found is not None and failure is not None:
            failure.add_note(str(found))

    def overwrite(
        self,
        name: str,
        average: Callable[[], Sequence[Tensor]],
        prepare: Callable[[], None],
        alike: Alike,
    ) -> None:
        """Overwrite the weights with an average for good; arguments as of :meth:`replaced`."""

        def get_ready() -> None:
            prepare()
            self._refuse_merged("copy_to()")

        self._together(get_ready, "ema.copy_to()", lambda: {"profile": name, **alike()})
        self._come_to_rest()
        with collective("ema.copy_to()"):
            self._stand_in.overwrite(average())
        self._come_to_rest()

    def _together(self, prepare: Callable[[], None], purpose: str, alike: Alike) -> None:
        """Prepare to overwrite weights, which takes all ranks in some layouts."""
        self.meet()
        if self._stand_in.enters_together:
            self.ranks.agree(prepare, purpose, alike)
        else:
            prepare()

    def _come_to_rest(self) -> None:
        """See to it that what was begun has read the parameters as they were, and what comes reads
        them as they are now.

        Frameworks copy and gather on other streams than the one that writes, and from host memory
        while the host goes on.
        """
        torch.clear_autocast_cache()  # the casts of a region that is around a swap
        lie = {named.tensor.device for named in self.inventory.averaged}
        wait_for(lie | self._source.compute_devices)


def _some(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
