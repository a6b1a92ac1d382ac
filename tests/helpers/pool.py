"""Worker processes that stay: one gloo world per size, into which tests send functions.

Starting four ranks costs many seconds, a call into running ones milliseconds, so every
multi-rank truth can have a test of its own. After a failure the world is killed and the next test
starts a fresh one: ranks that wait in a collective for one that failed cannot be trusted again.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# A rank that has not answered by then hangs. Twenty times what the slowest test needs.
TIMEOUT = 120.0


class WorkerPool:
    """``world_size`` processes with an initialised process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        folder = Path(tempfile.mkdtemp(prefix="sharded-ema-store-"))
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(rank, self.world_size, str(folder / "store"), theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(*args)`` on every rank; the results in rank order.

        Raises:
            AssertionError: with the traceback of every rank that failed or did not answer.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        failed = False
        while len(answers) < self.world_size:
            waiting = [p for r, p in enumerate(self._pipes) if r not in answers]
            # Once one rank has failed the others may wait for it for ever.
            ready = wait(waiting, timeout=5.0 if failed else TIMEOUT)
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, f"process died with {self._processes[rank].exitcode}")
                failed |= not answers[rank][0]
        if failed or len(answers) < self.world_size:
            self.kill()
            report = [
                f"--- rank {r}: {answers[r][1] if r in answers else 'no answer'}"
                for r in range(self.world_size)
                if r not in answers or not answers[r][0]
            ]
            raise AssertionError("\n".join(report))
        return [answers[r][1] for r in range(self.world_size)]

    def kill(self) -> None:
        """End all processes at once."""
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def stop(self) -> None:
        """End all processes in good order."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)
        self.kill()


def _work(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist
    from torch.distributed import device_mesh

    torch.set_num_threads(1)
    # A mesh is never given back, and each gloo group of it has threads that wake up a hundred
    # times a second: after some hundred tests the ranks would be busy with that alone.
    device_mesh.init_device_mesh = cache(device_mesh.init_device_mesh)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = (True, function(*args))
                dist.barrier()
        except BaseException:  # the test, not the worker, decides what a failure means
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    dist.barrier()
    dist.destroy_process_group()
