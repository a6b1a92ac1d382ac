"""How meeting grows with the number of ranks: the store of the job, and what follows on gloo.

``python launch/bench/ranks.py``. Two tables:

* ``store``: up to 8,192 simulated members check in at one real TCPStore, as the ranks do at the
  first ``attach()`` before they make their group. Each is a thread with a connection of its own; a
  few processes hold them. Time is from the first member's start to the last one's return; bytes
  are what the members send and receive, keys and values.
* ``ranks``: up to 64 real ranks, a process each, on gloo: ``attach()``, the first ``swap()`` and
  ``save()`` of a small model sharded with FSDP2.

Processes on one machine share its cores, so that the second table says how time grows and not what
a cluster would take.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from measure import ROOT, append_rows, machine
from sharded_ema import ShardedEMA
from sharded_ema.model.meeting import Room

MEMBERS = (64, 512, 1024, 2048, 4096, 8192)
RANKS = (2, 8, 16, 32, 64)
PROCESSES = 8
TIMEOUT = 300.0
COLUMNS = (
    *("date", "git sha", "torch", "python", "cpu"),
    *("table", "ranks", "what", "seconds", "bytes_per_rank"),
)


class Counted(dist.Store):
    """A store that counts what passes through it."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._inside = store
        self.num_bytes = 0

    def _count(self, *passed: str | bytes) -> None:
        self.num_bytes += sum(map(len, passed))

    def set(self, key: str, value: str) -> None:
        self._count(key, value)
        self._inside.set(key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self._inside.get(key)
        self._count(key, value)
        return value

    def add(self, key: str, amount: int) -> int:
        self._count(key, bytes(16))
        return int(self._inside.add(key, amount))

    def check(self, keys: list[str]) -> bool:
        self._count(*keys)
        return bool(self._inside.check(keys))

    def delete_key(self, key: str) -> bool:
        self._count(key)
        return bool(self._inside.delete_key(key))


# ---------------------------------------------------------------------- simulated members


def check_in(
    port: int, members: Sequence[int], size: int, ready: Barrier, answer: Connection
) -> None:
    """Some of the members, as threads of this process."""
    everyone = list(range(size))
    stores = [
        Counted(
            dist.TCPStore(
                "127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT),
                wait_for_workers=False,
            )
        )
        for _ in members
    ]  # fmt: skip
    failures: list[BaseException] = []

    def meet(member: int, store: Counted) -> None:
        try:
            Room(everyone, member, TIMEOUT, lambda: store).gather("ema.attach()")
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=meet, args=pair) for pair in zip(members, stores, strict=True)
    ]
    ready.wait()
    started = time.time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer.send((started, time.time(), sum(s.num_bytes for s in stores), list(map(str, failures))))


def simulate(size: int) -> tuple[float, float]:
    """Seconds until all of ``size`` members have met, and bytes for each of them."""
    server = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=TIMEOUT), wait_for_workers=False
    )
    context = multiprocessing.get_context("spawn")
    count = min(PROCESSES, size)
    ready, answers, processes = context.Barrier(count), [], []
    for index in range(count):
        ours, theirs = context.Pipe()
        members = range(index, size, count)
        process = context.Process(target=check_in, args=(server.port, members, size, ready, theirs))
        process.start()
        answers.append(ours)
        processes.append(process)
    told = [answer.recv() for answer in answers]
    for process in processes:
        process.join()
    failures = [text for *_, found in told for text in found]
    if failures:
        raise RuntimeError(f"{len(failures)} of {size} members failed: {failures[0]}")
    seconds = max(end for _, end, _, _ in told) - min(start for start, *_ in told)
    return seconds, sum(num_bytes for _, _, num_bytes, _ in told) / size


# ---------------------------------------------------------------------- real ranks


def train(rank: int, size: int, folder: str, answer: Connection) -> None:
    """One rank: the three things that all ranks do together, timed on it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, 0.9, timeout=TIMEOUT)

    def swap() -> None:
        with ema.swap():
            pass

    taken = {}
    calls: dict[str, Callable[[], Any]] = {
        "attach": lambda: ema.attach(optimizer),
        "first swap": swap,
        "save": lambda: ema.save(f"{folder}/checkpoint", step=1),
    }
    for name, call in calls.items():
        dist.barrier()
        start = time.perf_counter()
        call()
        dist.barrier()
        taken[name] = time.perf_counter() - start
    ema.close()
    answer.send(taken)
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int) -> dict[str, float]:
    """Seconds of the slowest of ``size`` ranks."""
    folder = tempfile.mkdtemp(prefix="bench-ranks-")
    context = multiprocessing.get_context("spawn")
    answers, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=train, args=(rank, size, folder, theirs))
        process.start()
        answers.append(ours)
        processes.append(process)
    told = [answer.recv() for answer in answers]
    for process in processes:
        process.join()
    shutil.rmtree(folder)
    return {name: max(taken[name] for taken in told) for name in told[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append to the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--members", type=int, nargs="*", default=list(MEMBERS))
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/ranks.csv")
    args = parser.parse_args(argv)
    lines: list[dict[str, str]] = []
    base = {k: v for k, v in machine().items() if k in COLUMNS}

    def add(table: str, ranks: int, what: str, seconds: float, num_bytes: float | None) -> None:
        shown = "" if num_bytes is None else f"{num_bytes:.0f}"
        print(f"{table:<6} {ranks:>5} {what:<12} {seconds:>9.3f} s {shown:>6} bytes a rank")
        lines.append(
            base
            | {
                "table": table,
                "ranks": str(ranks),
                "what": what,
                "seconds": f"{seconds:.4f}",
                "bytes_per_rank": shown,
            }
        )

    for size in args.members:
        seconds, num_bytes = simulate(size)
        add("store", size, "check in", seconds, num_bytes)
    for size in args.ranks:
        for what, seconds in measure(size).items():
            add("ranks", size, what, seconds, None)
    append_rows(args.output, COLUMNS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
