"""The ranks that share a model come to one verdict, on a process group of their own.

Nothing here runs in a training step. Collectives for checkpoints and swaps never use the training
group: a background save and a training collective that met there would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from sharded_ema.errors import AbsentRankError, EMAError, StateError, error_classes

T = TypeVar("T")


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
        self._everyone = dist.is_initialized() and len(self._ranks) == dist.get_world_size()
        self.size = max(1, len(self._ranks))
        self.rank = self._ranks.index(dist.get_rank()) if self.size > 1 else 0

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank decides for all: the first one."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The gloo group, or ``None`` for a single process.

        Raises:
            StateError: the default process group is gone, so no new one can be made.
        """
        if self.size > 1 and self._group is None:
            if not dist.is_initialized():
                raise StateError(
                    "the process group has been destroyed; call close() and all saves before "
                    "torch.distributed.destroy_process_group()"
                )
            self._group = dist.new_group(
                self._ranks,
                backend="gloo",
                timeout=self._timeout,
                use_local_synchronization=not self._everyone,
            )
        return self._group

    def barrier(self, purpose: str) -> None:
        """Wait for all ranks.

        Raises:
            AbsentRankError: a rank did not come within the timeout; on the coordinator the
                message names it.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(self.group, timeout=self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise AbsentRankError(
                f"not every rank came to {purpose} within {self._timeout.total_seconds():g} s "
                f"(this is rank {dist.get_rank()}). All ranks must call it: do not guard it with "
                f"'if rank == 0'. {str(error).strip()}"
            ) from error

    def gather(self, value: T, purpose: str) -> list[T]:
        """The values of all ranks, on all ranks, in rank order."""
        if self.size == 1:
            return [value]
        self.barrier(purpose)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, check: Callable[[], T], purpose: str) -> list[T]:
        """Run ``check`` on every rank and return all results, or raise on every rank.

        Raises:
            EMAError: of the class that the first failing rank met, with all ranks' messages.
        """
        failure: EMAError | None = None
        result: Any = None
        try:
            result = check()
        except EMAError as error:
            failure = error
        if self.size == 1:
            if failure is not None:
                raise failure
            return [result]
        verdict = (type(failure).__name__, str(failure)) if failure else None
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
