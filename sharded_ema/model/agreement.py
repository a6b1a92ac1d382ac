"""The ranks that share a model come to one verdict, on a process group of their own.

Nothing here runs in a training step. What the ranks tell each other about checkpoints never goes
through the groups of the training: a save in the background and a training collective that met
there would wait for each other. A swap and ``copy_to()`` gather in those, in a ``collective``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from sharded_ema.errors import (
    AbsentRankError,
    EMAError,
    RanksDifferError,
    StateError,
    error_classes,
)
from sharded_ema.model.internals.pytorch import is_of_a_lost_rank, new_gloo_group
from sharded_ema.model.meeting import Room, absence, restart_hint

T = TypeVar("T")

# Of one collective, for each of which the ranks wait no longer than the timeout.
_BROADCAST_BYTES = 1 << 26


@contextmanager
def collective(purpose: str) -> Iterator[None]:
    """Around collectives in the groups of the training.

    Raises:
        AbsentRankError: a rank was lost in one of them.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_a_lost_rank(error):
            raise
        raise AbsentRankError(
            f"a rank was lost in {purpose}: {str(error).strip()}{restart_hint()}"
        ) from error


class Ranks:
    """A gloo group over the ranks of a model, made when it is first needed.

    A group that a rank was lost in is given up; the ranks make another when they next meet, so
    that a call which came too early spoils no later one.

    Args:
        ranks: global ranks in order; none or one means that there is nobody to agree with.
        timeout: seconds to wait for a rank before it counts as absent.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        self._ranks = list(ranks)
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None
        self.size = max(1, len(self._ranks))
        self.rank = self._ranks.index(dist.get_rank()) if self.size > 1 else 0
        self._room = Room(self._ranks, self.members[self.rank], timeout)

    @property
    def members(self) -> list[int]:
        """Their global numbers."""
        return self._ranks or [0]

    def claim(self, name: str) -> list[int]:
        """Claim what these ranks write, if others in the job could write it too; for the first one.

        Returns:
            The ranks whose it is.
        """
        alone = not dist.is_initialized() or dist.get_world_size() == self.size
        return self.members if alone else self._room.claim(name)

    def again(self) -> Ranks:
        """The same ranks, to meet in another group."""
        return Ranks(self._ranks, self._timeout)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The gloo group, or ``None`` for a single process."""
        return self._group

    def barrier(self, purpose: str) -> None:
        """Wait for all ranks, and make their group if there is none.

        Raises:
            AbsentRankError: a rank did not come within the timeout; the message names it.
            StateError: the default process group is gone.
        """
        if self.size == 1:
            return
        with self.interruptible():
            self._meet(purpose)

    def _meet(self, purpose: str) -> None:
        if not dist.is_initialized():
            raise StateError(
                "the process group has been destroyed; call close() and all saves before "
                "torch.distributed.destroy_process_group()"
            )
        if self._group is not None and self._room.is_broken():
            self._group = None
        if self._group is None:
            self._make_group(purpose)
        with self._room.arriving(purpose), self._unless_lost(purpose, came=False):
            limit = timedelta(seconds=self._timeout)
            dist.monitored_barrier(self._group, timeout=limit, wait_all_ranks=True)

    def _make_group(self, purpose: str) -> None:
        word = self._room.gather(purpose)
        limit = timedelta(seconds=self._timeout)
        with self._unless_lost("making their group"):
            self._group = new_gloo_group(self._ranks, word, limit)

    @contextmanager
    def _unless_lost(self, purpose: str, *, came: bool = True) -> Iterator[None]:
        """Turn what a broken collective raises into an error that says so.

        Args:
            came: whether all ranks were known to be there before.
        """
        try:
            yield
        except RuntimeError as error:
            missing = [] if came else self._late()
            self.give_up()
            said = str(error).strip()
            text = (
                f"a rank was lost in {purpose}: {said}"
                if came
                else f"{absence(purpose, self.members[self.rank], self._timeout, missing)} {said}"
            )
            raise AbsentRankError(f"{text}{restart_hint()}") from error

    def _late(self) -> list[int]:
        try:
            return self._room.late()
        except RuntimeError:  # no store any more
            return []

    def gather(self, value: T, purpose: str) -> list[T]:
        """The values of all ranks, on all ranks, in rank order.

        Raises:
            AbsentRankError: a rank did not come, or died on the way.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.interruptible():
            self.barrier(purpose)
            with self._unless_lost(purpose):
                dist.all_gather_object(values, value, group=self._group)
        return values

    def same(self, number: int | None) -> bool:
        """Whether all ranks, which have just met, name the same number; none names none.

        A few bytes, whatever the number of ranks.

        Args:
            number: from 0 to 2 ** 62.

        Raises:
            RuntimeError: a rank was lost.
        """
        if self.size == 1:
            return number is not None
        own = -1 if number is None else number
        least = torch.tensor([own, -own])
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        low, high = least.tolist()
        return low == -high != -1

    def broadcast(self, data: NDArray[np.uint8], purpose: str) -> None:
        """Overwrite bytes on all ranks with those of the first; the ranks have just met.

        Args:
            data: ``(bytes,)``, of one size on all ranks.

        Raises:
            AbsentRankError: a rank was lost on the way.
        """
        if self.size == 1:
            return
        with self.talking(purpose):
            for start in range(0, data.nbytes, _BROADCAST_BYTES):
                part = torch.from_numpy(data[start : start + _BROADCAST_BYTES])
                dist.broadcast(part, src=self.members[0], group=self._group)

    @contextmanager
    def talking(self, purpose: str) -> Iterator[None]:
        """Around collectives in the group of the ranks, which have just met there.

        Raises:
            AbsentRankError: a rank was lost in one of them.
        """
        with self.interruptible(), self._unless_lost(purpose):
            yield

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """End the group if the block is interrupted, so that no rank waits for this one.

        In a collective that this rank leaves by Ctrl-C, or never comes to, the others get an error
        at once. They make another group when all next meet.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as interruption:
            # What hangs up is the death of the group, which frames on the way still hold.
            traceback.clear_frames(interruption.__traceback__)
            self._room.break_up()
            self.close()
            raise

    def agree(
        self,
        check: Callable[[], T],
        purpose: str,
        alike: Callable[[], Mapping[str, Any]] = dict,
    ) -> list[T]:
        """Run ``check`` on every rank and return all results, or raise on every rank.

        Args:
            alike: tells after the check what must be the same on all ranks, by what to call it.

        Raises:
            EMAError: of the class that the first failing rank met, with all ranks' messages.
            RanksDifferError: something is not alike; the ranks are named.
            BaseException: what is no failure, such as an interruption from the keyboard, is raised
                where it came; the other ranks are told by an error.
        """
        if self.size == 1:
            return [check()]
        failure: BaseException | None = None
        result: Any = None
        settings: Mapping[str, Any] = {}
        try:
            result, settings = check(), alike()
        except BaseException as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        verdict = None
        if isinstance(failure, EMAError):
            verdict = (type(failure).__name__, str(failure))
        elif failure is not None:
            verdict = (EMAError.__name__, f"{type(failure).__name__}: {failure}")
        interrupted = failure is not None and not isinstance(failure, Exception)
        try:
            with self.interruptible():
                self.barrier(purpose)
                with self._unless_lost(purpose):
                    alike_all = self.same(_number((settings, result)) if not failure else None)
            if alike_all:
                return [result] * self.size
            answers = self.gather((verdict, settings, result), purpose)
        except EMAError:
            if not interrupted:
                raise
        if failure is not None and interrupted:
            raise failure
        raise_joint_failure({r: v for r, (v, _, _) in enumerate(answers) if v}, cause=failure)
        _refuse_differing([told for _, told, _ in answers], self.members, purpose)
        return [value for _, _, value in answers]

    def give_up(self) -> None:
        """The group is of no more use, since a collective in it broke; the ranks make another."""
        self._group = None
        self._room.break_up()

    def close(self) -> None:
        """Give the group back; harmless when the process group is already gone."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


def _number(answer: tuple[Mapping[str, Any], Any]) -> int | None:
    """What stands for an answer among the ranks; ``None`` for one that only its rank can read."""
    settings, result = answer
    if not isinstance(result, bool | int | str | Path | None):
        return None
    told = repr((dict(settings), type(result), result)).encode()
    return int(xxhash.xxh3_64_intdigest(told)) >> 2


def _refuse_differing(
    settings: Sequence[Mapping[str, Any]], members: Sequence[int], purpose: str
) -> None:
    """Refuse what should be the same on all ranks and is not.

    Args:
        settings: of every rank, by what to call them.
        members: global numbers of these ranks.

    Raises:
        RanksDifferError: see above.
    """
    lines = []
    for name, value in settings[0].items():
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in zip(members, settings, strict=True):
            ranks.setdefault(repr(of_rank.get(name, value)), []).append(rank)
        if len(ranks) > 1:
            lines.append(
                f"{name} is " + " and ".join(f"{v} on ranks {_some(r)}" for v, r in ranks.items())
            )
    if lines:
        raise RanksDifferError(
            f"the ranks differ in {purpose}: {'; '.join(lines)}. Every rank must do the same: look "
            "for an 'if rank == 0' around update(), and for names made of a clock or a rank"
        )


def _some(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:5]))
    return f"{shown}{f' and {len(ranks) - 5} more' if len(ranks) > 5 else ''}"


def raise_joint_failure(
    verdicts: dict[int, tuple[str, str]], *, cause: BaseException | None = None
) -> None:
    """Raise one error for failures met by several ranks, the same on each of them.

    Args:
        verdicts: class name and message by rank; nothing happens if empty.
        cause: what this rank met itself.
    """
    if not verdicts:
        return
    first = min(verdicts)
    name, message = verdicts[first]
    failures = {rank: text for rank, (_, text) in verdicts.items()}
    others = f" (and ranks {sorted(failures)[1:]})" if len(failures) > 1 else ""
    cls = error_classes().get(name, EMAError)
    joint = cls(f"rank {first}{others}: {message}", failures)
    # With the frames of what happened here, and not with its text, which would be printed twice.
    raise joint.with_traceback(cause.__traceback__ if cause else None) from None
