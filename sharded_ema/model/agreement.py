"""The ranks that share a model come to one verdict, on a process group of their own.

Nothing here runs in a training step. Collectives for checkpoints and swaps never use the training
group: a background save and a training collective that met there would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from sharded_ema.errors import AbsentRankError, BindError, EMAError, StateError, error_classes
from sharded_ema.model.internals.pytorch import default_store
from sharded_ema.model.layout import Box

T = TypeVar("T")

# Groups made so far, by their ranks: all ranks count alike, so the number names a meeting.
_MEETINGS: dict[tuple[int, ...], int] = {}


class Ranks:
    """A gloo group over the ranks of a source, made when it is first needed.

    Args:
        ranks: global ranks in order; none or one means that there is nobody to agree with.
        timeout: seconds to wait for a rank before it counts as absent.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        self._ranks = list(ranks)
        self._timeout = timedelta(seconds=timeout)
        self._group: dist.ProcessGroup | None = None
        self._lost: str | None = None
        self._everyone = dist.is_initialized() and len(self._ranks) == dist.get_world_size()
        self.size = max(1, len(self._ranks))
        self.rank = self._ranks.index(dist.get_rank()) if self.size > 1 else 0

    def again(self) -> Ranks:
        """The same ranks, to meet in another group."""
        return Ranks(self._ranks, self._timeout.total_seconds())

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The gloo group, or ``None`` for a single process.

        Raises:
            StateError: the default process group is gone, so no new one can be made.
            AbsentRankError: a rank died while it was made.
        """
        if self.size > 1 and not dist.is_initialized():
            raise StateError(
                "the process group has been destroyed; call close() and all saves before "
                "torch.distributed.destroy_process_group()"
            )
        if self.size > 1 and self._group is None:
            try:
                self._group = dist.new_group(
                    self._ranks,
                    backend="gloo",
                    timeout=self._timeout,
                    use_local_synchronization=not self._everyone,
                )
            except RuntimeError as error:
                self._lost = "making their group"
                raise AbsentRankError(f"a rank was lost in making a group: {error}") from error
        return self._group

    def barrier(self, purpose: str) -> None:
        """Wait for all ranks.

        Raises:
            AbsentRankError: a rank did not come within the timeout; on the coordinator the
                message names it.
        """
        if self.size == 1:
            return
        if self._lost is not None:
            raise AbsentRankError(
                f"the ranks lost each other in {self._lost} and cannot come to {purpose}; make a "
                "new ShardedEMA on all ranks, or restart from a checkpoint"
            )
        if self._group is None:
            self._check_in(purpose)
        group = self.group
        try:
            dist.monitored_barrier(group, timeout=self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            self._lost = purpose
            raise AbsentRankError(self._absence(purpose, str(error).strip())) from error

    def _absence(self, purpose: str, who: str) -> str:
        return (
            f"not every rank came to {purpose} within {self._timeout.total_seconds():g} s "
            f"(this is rank {dist.get_rank()}). All ranks must call it: do not guard it with "
            f"'if rank == 0'. {who}"
        )

    def _check_in(self, purpose: str) -> None:
        """Meet in the store before the first group is made.

        A process group that only some ranks begin to make breaks the making of all later ones in
        the whole job, so nobody begins before all are here.
        """
        if not dist.is_initialized():
            return  # making the group will say so
        store = default_store()
        key = tuple(self._ranks)
        number = _MEETINGS.get(key, 0)
        room = f"sharded_ema/{'-'.join(map(str, key))}/{number}"
        mine = f"{room}/{dist.get_rank()}"
        store.set(mine, "here")
        try:
            store.wait([f"{room}/{rank}" for rank in self._ranks], self._timeout)
        except RuntimeError as error:
            missing = [rank for rank in self._ranks if not store.check([f"{room}/{rank}"])]
            store.delete_key(mine)  # whoever comes later must not think that this rank waits
            raise AbsentRankError(
                self._absence(purpose, f"Ranks {missing} are missing.")
            ) from error
        _MEETINGS[key] = number + 1

    def gather(self, value: T, purpose: str) -> list[T]:
        """The values of all ranks, on all ranks, in rank order.

        Raises:
            AbsentRankError: a rank did not come, or died on the way.
        """
        if self.size == 1:
            return [value]
        self.barrier(purpose)
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:  # all were here a moment ago
            self._lost = purpose
            raise AbsentRankError(f"a rank was lost in {purpose}: {error}") from error
        return values

    def agree(self, check: Callable[[], T], purpose: str) -> list[T]:
        """Run ``check`` on every rank and return all results, or raise on every rank.

        Raises:
            EMAError: of the class that the first failing rank met, with all ranks' messages.
        """
        if self.size == 1:
            return [check()]
        failure: Exception | None = None
        result: Any = None
        try:
            result = check()
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            failure = error
        verdict = None
        if isinstance(failure, EMAError):
            verdict = (type(failure).__name__, str(failure))
        elif failure is not None:
            verdict = (EMAError.__name__, f"{type(failure).__name__}: {failure}")
        answers = self.gather((verdict, result), purpose)
        raise_joint_failure({r: v for r, (v, _) in enumerate(answers) if v}, cause=failure)
        return [value for _, value in answers]

    def close(self) -> None:
        """Give the group back; harmless when the process group is already gone.

        A group of some of the ranks lives on until the default one is destroyed: PyTorch names
        such groups by their members, and a second one would meet the first one's addresses.
        """
        if self._group is not None and self._everyone and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


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
    raise cls(f"rank {first}{others}: {message}", failures) from cause


def refuse_differing(records: Sequence[Mapping[str, tuple[Box, str]]]) -> None:
    """Refuse blocks that several ranks should hold alike and do not.

    Args:
        records: of every rank, by parameter name, the block it holds and a digest of that.

    Raises:
        BindError: two ranks differ in a block, or in what parameters there are.
    """
    seen: dict[tuple[str, Box], tuple[int, str]] = {}
    for rank, record in enumerate(records):
        for name in records[0].keys() ^ record.keys():
            raise _differing(name, 0, rank)
        for name, (box, digest) in record.items():
            first, expected = seen.setdefault((name, box), (rank, digest))
            if digest != expected:
                raise _differing(name, first, rank)


def _differing(name: str, first: int, second: int) -> BindError:
    return BindError(
        f"parameter {name} is not sharded but differs between rank {first} and rank {second}; a "
        "checkpoint would keep one of the two. Wrap the model in DistributedDataParallel or "
        "fully_shard, pass sync_module_states=True to FullyShardedDataParallel, or broadcast its "
        "parameters"
    )
