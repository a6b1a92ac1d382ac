"""The model that an average follows: its shards, its optimizer's steps, and what stands in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor

from sharded_ema.errors import AbsentRankError, EMAError, StateError, SwapError
from sharded_ema.model.agreement import Ranks, refuse_differing
from sharded_ema.model.devices import is_accelerator, is_capturing, wait_for
from sharded_ema.model.inventory import Inventory
from sharded_ema.model.layout import Box
from sharded_ema.model.sources.protocol import Backup, ReadsShards, Source
from sharded_ema.model.steps import StepHooks, StepListener, StepWatch

#: Blocks that are equal wherever they lie, by name, with digests of their elements.
Record = dict[str, tuple[Box, str]]


class FollowedModel:
    """A model of several ranks, as one average sees it.

    Args:
        source: its shards, and how another set of weights takes their place.
        timeout: seconds to wait for a rank before it counts as absent.

    Attributes:
        reader: its shards.
        ranks: where its ranks meet.
        names: of the averaged tensors on this rank.
        elsewhere: names that are averaged on other ranks only, once all have met.
        standing_in: name of the average that stands in for the weights, if one does.
        backup_bytes: memory that the weights take meanwhile.
    """

    # What a copy does not share: it is attached to nothing.
    not_copied = ("_steps",)
    _steps: StepHooks | None = None

    def __init__(self, source: Source, timeout: float) -> None:
        self._source = source
        self._stand_in = source.stand_in
        self.reader: ReadsShards = source.reader
        self.names = [shard.name.fqn for shard in self.reader.shards]
        self.ranks = Ranks(self.reader.ranks, timeout)
        self.elsewhere: frozenset[str] = frozenset()
        self.standing_in: str | None = None
        self.backup_bytes = 0
        self._met = False
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

    @property
    def counted_here(self) -> list[int]:
        """Positions of what this rank counts in a sum over all ranks; equal copies count once."""
        return [i for i, shard in enumerate(self.reader.shards) if shard.writes]

    # ------------------------------------------------------------------ steps

    @property
    def steps(self) -> StepHooks | None:
        """What tells of applied steps; ``None`` while nothing is attached."""
        return self._steps

    def attach(self, optimizers: Sequence[Any], listener: StepListener) -> StepHooks:
        """Follow the steps of optimizers, or of the engine that trains the model. Collective.

        Raises:
            StateError: steps are followed already.
            EMAError: the model contradicts itself, or differs between ranks; on all of them.
        """
        if self._steps is not None:
            raise StateError("already attached; call remove() on the first handle before")

        def bind() -> None:
            self._steps = self._source.steps(optimizers, listener)

        try:
            self._meet(bind, "ema.attach()")
        except EMAError:
            if self._steps is not None:
                self._steps.remove()
            raise
        assert self._steps is not None
        return self._steps

    def watch(self, call: Callable[[], None]) -> StepWatch:
        """Have a method called before every step of an optimizer of the averaged parameters."""
        trained = (n for n in self.inventory.averaged if n.is_parameter)
        return StepWatch({id(named.tensor) for named in trained}, call)

    def refuse_capture(self) -> None:
        """Refuse an update that a stream would record instead of computing.

        Raises:
            StateError: see above.
        """
        if any(is_capturing(device) for device in self._accelerators):
            raise StateError(
                "an update was called while the current stream records a graph: replayed, it would "
                "repeat the decay of this step and count none. Keep it out of the capture (detach "
                "the optimizer whose step is captured) and call ema.update() after each replay"
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
        if not self._met:
            self._meet(_nothing, "the first agreement of all ranks")

    def _meet(self, bind: Callable[[], None], purpose: str) -> None:
        """Do ``bind`` on every rank; if it fails on one, all raise. Then compare what they hold."""

        def verdict() -> tuple[Record, list[str]]:
            bind()
            if self._met:
                return {}, []
            self.reader.self_check()
            if self.ranks.size == 1:
                return {}, []
            record = {name: (c.box, _digest(c.tensor)) for name, c in self.reader.copies().items()}
            return record, [] if self.reader.holds_all_names else self.names

        answers = self.ranks.agree(verdict, purpose)
        if not self._met:
            refuse_differing([record for record, _ in answers])
            others = (name for _, names in answers for name in names)
            self.elsewhere = frozenset(others) - set(self.names)
        self._met = True

    def drift_record(self) -> Record:
        """A few elements of what the user's program must keep equal, to be compared in training."""
        if self.ranks.size == 1:
            return {}
        return {
            name: (c.box, _digest(c.tensor.detach().reshape(-1)[:: c.tensor.numel() // 64 + 1]))
            for name, c in self.reader.copies().items()
            if not c.synchronised
        }

    # ------------------------------------------------------------------ standing in

    def settle(self) -> None:
        """Bring the model to rest, and make sure that it still has what is averaged.

        All ranks must, or none: the next forward gathers again what was freed here.

        Raises:
            BindError: a tensor was replaced.
        """
        self._stand_in.settle()
        self.inventory.check_current()

    def refuse_in_swap(self, what: str) -> None:
        """Refuse something that needs the weights themselves.

        Raises:
            SwapError: an average stands in for them.
        """
        if self.standing_in is not None:
            raise SwapError(
                f"{what} is not allowed while the average {self.standing_in!r} stands in for the "
                "parameters; leave the swap() block first"
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
        self, name: str, average: Callable[[], Sequence[Tensor]], prepare: Callable[[], None]
    ) -> Iterator[None]:
        """Let an average stand in for the weights, and put these back exactly.

        Args:
            name: of the average.
            average: this rank's part of it, asked for once all is prepared.
            prepare: what must be done on every rank before; if it fails on one, all raise.

        Raises:
            SwapError: where leaving is collective, another rank left with an exception.
            AbsentRankError: a rank did not come to a collective entry or exit.
        """
        backup: Backup = []

        def back_up() -> None:
            prepare()
            backup.extend(self._stand_in.back_up())

        self._together(back_up, "ema.swap()")
        self.backup_bytes = sum(copy.numel() * copy.element_size() for _, copy in backup)
        self.standing_in = name
        failure: BaseException | None = None
        try:
            self._stand_in.swap_in(average())
            self._wait_for_writes()
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self._put_back(backup, failure)

    def _put_back(self, backup: Backup, failure: BaseException | None) -> None:
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
            self._stand_in.restore(backup)
        finally:
            self._wait_for_writes()
            self.standing_in = None
            self.backup_bytes = 0
        if failures and failure is None:
            rank = min(failures)
            raise SwapError(
                f"rank {rank} left the swap() block with {failures[rank]}; the parameters are "
                "restored on all ranks",
                failures,
            )

    def overwrite(
        self, average: Callable[[], Sequence[Tensor]], prepare: Callable[[], None]
    ) -> None:
        """Overwrite the weights with an average for good; arguments as of :meth:`replaced`."""
        self._together(prepare, "ema.copy_to()")
        self._stand_in.overwrite(average())
        self._wait_for_writes()

    def _together(self, prepare: Callable[[], None], purpose: str) -> None:
        """Prepare to overwrite weights, which takes all ranks in some layouts."""
        self.meet()
        if self._stand_in.enters_together:
            self.ranks.agree(prepare, purpose)
        else:
            prepare()

    def _wait_for_writes(self) -> None:
        """See to it that what comes reads the parameters as they are now."""
        torch.clear_autocast_cache()  # the casts of a region that is around a swap
        # FSDP may gather on another stream than the one that copied.
        wait_for(named.tensor.device for named in self.inventory.averaged)


def _nothing() -> None:
    pass


def _digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's elements in C order, as hex digits. Copies GPU tensors to the host."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_128_hexdigest(plain.view(torch.uint8).numpy().data)
