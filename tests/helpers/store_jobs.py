"""Processes that save to a store and may be killed at any request."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sharded_ema import EMAError, ShardedEMA
from tests.helpers.crash import PRELOADED, TIMEOUT
from tests.helpers.stores import Store


def average(value: float) -> ShardedEMA:
    """An average whose elements are all one number."""
    model = torch.nn.Linear(300, 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return ShardedEMA(model, 0.9)


def value_of(url: str) -> float:
    """The number that a checkpoint holds in all its elements, checked against its digests."""
    ema = average(-1.0)
    ema.load(url, verify=True)
    (found,) = torch.cat([v.reshape(-1) for k, v in ema.state_dict().items() if "." in k]).unique()
    return float(found)


def save_job(store: Store, jobs: list[tuple[str, float, bool]], together: Any, pipe: Any) -> None:
    """Save to URLs one after the other, and say what came of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store.connect()
    found = []
    for path, value, asynchronous in jobs:
        ema = average(value)
        if together is not None:
            together.wait(TIMEOUT)
        try:
            ema.save(store.url(path), step=int(value), asynchronous=asynchronous).result()
            found.append("saved")
        except EMAError as error:
            found.append(f"{type(error).__name__}: {error}")
    pipe.send(found)
    pipe.close()
    os._exit(0)  # threads of drivers have nothing to do any more


class Jobs:
    """Starts such processes; a fork each."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED, "tests.helpers.store_jobs"])

    @contextmanager
    def running(
        self, store: Store, *jobs: list[tuple[str, float, bool]]
    ) -> Iterator[list[tuple[Any, Any]]]:
        """Processes and the pipes on which they say what came of it."""
        together = self._context.Barrier(len(jobs)) if len(jobs) > 1 else None
        started = []
        for job in jobs:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=save_job, args=(store, job, together, theirs), daemon=True
            )
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            yield started
        finally:
            for process, ours in started:
                process.kill()
                process.join(TIMEOUT)
                ours.close()

    def run(self, store: Store, *jobs: list[tuple[str, float, bool]]) -> list[list[str]]:
        """What came of each save of each job."""
        with self.running(store, *jobs) as started:
            assert all(pipe.poll(TIMEOUT) for _, pipe in started), "a job hangs"
            return [pipe.recv() for _, pipe in started]

    def is_killed(self, store: Store, job: tuple[str, float, bool], victim: list[int]) -> bool:
        """Run one save, whose process may be killed; whether it was.

        Args:
            victim: where its number is put, for who kills it.
        """
        with self.running(store, [job]) as ((process, _),):
            victim.append(process.pid)
            process.join(TIMEOUT)
            assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
            return bool(process.exitcode)
