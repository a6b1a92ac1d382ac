"""The processes of a run: start and end, the device of each, and how they agree on errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from sharded_ema import EMAError

T = TypeVar("T")


class RunError(Exception):
    """The run cannot go on; the text tells the user why. Raised on all ranks or on none."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Without a process group, the only one.

    Attributes:
        copies: neighbouring ranks that share the work on the same text (tensor parallelism).
    """

    rank: int
    size: int
    device: torch.device
    copies: int = 1

    @property
    def first(self) -> bool:
        """Whether this process prints and writes what is written once."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """Into how many parts a batch is divided."""
        return self.size // self.copies

    @property
    def part(self) -> int:
        """Which of the parts is computed here."""
        return self.rank // self.copies

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order, on every rank."""
        if not dist.is_initialized():
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the parts of a batch, in place."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values.div_(self.copies)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over the ranks, in place; of a tensor on the CPU."""
        if dist.is_initialized():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if dist.is_initialized():
            dist.barrier()

    def everywhere(self, work: Callable[[], T]) -> T:
        """Run ``work`` on all ranks; if it fails on one, all raise: nobody waits for the dead."""
        result, failure = _attempt(work)
        failures = self.gather(failure)
        for rank, text in enumerate(failures):
            if text is not None:
                raise RunError(text if len(set(failures)) == 1 else f"rank {rank}: {text}")
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 alone and hand its result, or its error, to all."""
        result, failure = self.gather(_attempt(work) if self.first else (None, None))[0]
        if failure is not None:
            raise RunError(failure)
        return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except (RunError, EMAError, OSError) as error:
        return None, str(error)


@contextmanager
def start_ranks(distributed: bool, copies: int = 1) -> Iterator[Ranks]:
    """Set device and threads, join the process group, and leave it in good order."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # deepspeed's
        _share_cores(int(here or "1"))
    if not distributed:
        yield Ranks(0, 1, device)
        return
    # Both backends, so that small objects are agreed on over gloo and never touch the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size(), device, copies)
    # Only the good end waits for the others: after an error on one rank alone they may never come.
    # Without the barrier gloo can abort a rank whose peers have closed their connections first.
    dist.barrier()
    dist.destroy_process_group()


def _share_cores(processes: int) -> None:
    """Give each process of this machine its part of the cores.

    torchrun sets OMP_NUM_THREADS=1 when the user has not set it; any other value is the user's.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // processes))
