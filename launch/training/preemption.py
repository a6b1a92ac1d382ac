"""Stopping in good order when a scheduler wants the machine back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from training.ranks import Ranks

# What schedulers send some time before they kill; the second is the usual choice for a warning
# before the limit of time (sbatch --signal=USR1@300).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def leave_signals_to_parent(worker: int) -> None:
    """In a process that reads data: live on, as the rank does, until the rank ends it.

    Schedulers signal every process of a job. A reader that dies of it would end its rank before
    the last save.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Preemption:
    """Whether this run was told to stop, by a signal to any of its processes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._told = False

    def agreed(self) -> bool:
        """Whether any rank was told by now; all ranks ask together, and get the same answer.

        One byte over gloo: ranks get a signal between different steps, or only one gets it, and
        all must save the same step.
        """
        told = torch.tensor([self._told], dtype=torch.uint8)
        return bool(self._ranks.largest(told))

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True


@contextmanager
def watch_signals(ranks: Ranks) -> Iterator[Preemption]:
    """Note the signals instead of dying of them, as long as steps are made."""
    preemption = Preemption(ranks)
    before = {number: signal.signal(number, preemption._tell) for number in SIGNALS}
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
