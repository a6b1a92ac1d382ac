"""Two jobs that are killed again and again and two readers share a directory, or a bucket.

Clocks go back at random. Whatever is read is what was saved at its step, nothing that is not this
library's is touched, and no committed checkpoint goes but those that ``keep_last`` gives up.
``SOAK_SECONDS`` says how long, half of it on each; an hour unless it is set.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_ema import ShardedEMA, latest_checkpoint
from sharded_ema.checkpoint.run import committed
from sharded_ema.errors import CheckpointNotFoundError, CheckpointUncommittedError
from tests.helpers.crash import PRELOADED, TIMEOUT
from tests.helpers.stores import Server, Store, missing

SECONDS = float(os.environ.get("SOAK_SECONDS", "3600"))
KEEP = 3
JOBS = {"a": 1_000_000, "b": 2_000_000}
#: What belongs to somebody else, though some of it looks like ours.
STRANGERS = {
    "notes.txt": b"notes",
    f"a_step_1.tmp-{'0' * 32}/thesis.tex": b"thesis",
    f"a_step_1.old-{'1' * 32}/thesis.tex": b"thesis",
    "c_step_7/model.bin": b"weights",
}


def job(root: str, store: Store | None, name: str, seed: int, log: str, stop: Any) -> None:
    """Take up what this job has saved last, and save step after step."""
    begin(store)
    draw, now = random.Random(seed), time.time_ns
    model = torch.nn.Linear(300, 20)
    ema = ShardedEMA(model, 0.0)
    mine = [c for c in committed(root) if c.path.name.startswith(f"{name}_step_")]
    step = 0
    if mine:
        step = ema.load(max(mine, key=lambda c: c.step).path, verify=True)
    while not stop.is_set():
        step += 1
        shift = draw.choice([0, 0, 60, 3600, 86400])
        time.time_ns = lambda: now() - shift * 10**9  # noqa: B023
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(JOBS[name] + step)
        ema.update()
        ema.save(
            f"{root}/{name}_step_{step}",
            step=step,
            asynchronous=draw.random() < 0.5,
            keep_last=KEEP,
        ).result()
        write_line(log, f"saved {step}")
        if store is None:
            ema.save(f"{root}/{name}_last", step=step, replace=True, latest=False)
    ema.close()
    os._exit(0)  # threads of drivers have nothing to do any more


def reader(root: str, store: Store | None, seed: int, log: str, stop: Any) -> None:
    """Read whatever is there."""
    begin(store)
    draw = random.Random(seed)
    ema = ShardedEMA(torch.nn.Linear(300, 20), 0.0)
    while not stop.is_set():
        places = [f"{name}_last" for name in JOBS] if store is None else []
        try:
            places += [c.path.name for c in committed(root)]
            place = draw.choice([*places, latest_checkpoint(root).name])
            step = ema.load(f"{root}/{place}", verify=True)
        except CheckpointNotFoundError:
            write_line(log, "gone")
            continue
        except CheckpointUncommittedError:  # in a store what goes loses its manifest first
            assert store is not None
            write_line(log, "gone")
            continue
        values = torch.cat([v.reshape(-1) for k, v in ema.state_dict().items() if "." in k])
        assert (values == JOBS[place[0]] + step).all(), (place, step, values.unique())
        # What is about to be replaced is a checkpoint still.
        name = place.partition(".old-")[0]
        assert name.endswith("_last") or name == f"{name[0]}_step_{step}", (place, step)
        write_line(log, "read")
    os._exit(0)


def begin(store: Store | None) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if store is not None:
        store.connect()


def write_line(log: str, text: str) -> None:
    """One write, so that a kill leaves a line or none."""
    with open(log, "ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


def run_reported(log: str, function: Any, *args: Any) -> None:
    try:
        function(*args)
    except BaseException:
        Path(f"{log}.failed").write_text(traceback.format_exc())
        os._exit(1)


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


class Soak:
    """The processes, and what is killed of them."""

    def __init__(self, folder: Path, root: str, store: Store | None) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED, "tests.stores.test_soak"])
        self._folder, self._root, self._store = folder, root, store
        self.stop = self._context.Event()
        self._seed = 0
        self.kills = 0

    def start(self, name: str) -> Any:
        self._seed += 1
        log = str(self._folder / name)
        what: tuple[Any, ...] = (reader, self._root, self._store, self._seed, log, self.stop)
        if name in JOBS:
            what = (job, self._root, self._store, name, self._seed, log, self.stop)
        process = self._context.Process(target=run_reported, args=(log, *what), daemon=True)
        process.start()
        return process

    def run(self, seconds: float) -> None:
        """All of it; what has failed is raised."""
        draw, end = random.Random(0), time.monotonic() + seconds
        running = {name: self.start(name) for name in (*JOBS, "r1", "r2")}
        try:
            while (left := end - time.monotonic()) > 0:
                wait([p.sentinel for p in running.values()], min(left, draw.uniform(1, 15)))
                ended = [name for name, process in running.items() if process.exitcode is not None]
                assert not ended, self.failures()
                if (victim := draw.choice([*JOBS, None])) is not None:
                    os.kill(running[victim].pid, signal.SIGKILL)
                    running[victim].join(TIMEOUT)
                    self.kills += 1
                    running[victim] = self.start(victim)
            self.stop.set()
            for process in running.values():
                process.join(TIMEOUT)
            assert {p.exitcode for p in running.values()} == {0}, self.failures()
        finally:
            for process in running.values():
                process.kill()
                process.join(TIMEOUT)

    def failures(self) -> str:
        return "\n".join(path.read_text() for path in self._folder.glob("*.failed"))


def check(folder: Path, root: str) -> dict[str, int]:
    """What must be there in the end; counts of what was done."""
    counts = {"saved": 0, "read": 0, "gone": 0}
    for name in JOBS:
        saved = [int(line.split()[1]) for line in lines(folder / name)]
        there = sorted(c.step for c in committed(root) if c.path.name.startswith(f"{name}_step_"))
        assert len(saved) == len(set(saved)), "a step that was committed is not saved again"
        # The last save may have been killed after its commit, before or while it removed others.
        assert there and there[-1] >= saved[-1]
        for step in saved:
            later = [s for s in there if s > step]
            assert step in there or len(later) >= KEEP, f"{name}_step_{step} is lost: {there}"
        counts["saved"] += len(saved)
    for name in ("r1", "r2"):
        for line in lines(folder / name):
            counts[line] += 1
    return counts


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Store | None]]:
    """Where the jobs save."""
    if request.param == "directory":
        yield str(tmp_path / "run"), None
        return
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    server = Server(request.param, tmp_path)
    yield server.store.url("run"), server.store
    server.stop()


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_soak(place: tuple[str, Store | None], tmp_path: Path) -> None:
    root, store = place
    logs = tmp_path / "logs"
    logs.mkdir()
    fs = store.connect() if store is not None else None
    for name, data in STRANGERS.items():
        if fs is not None:
            fs.pipe_file(f"{root}/{name}", data)
        else:
            Path(root, name).parent.mkdir(parents=True, exist_ok=True)
            Path(root, name).write_bytes(data)
    soak = Soak(logs, root, store)
    soak.run(SECONDS / 2)
    for name, data in STRANGERS.items():
        found = fs.cat_file(f"{root}/{name}") if fs is not None else Path(root, name).read_bytes()
        assert found == data, name
    counts = check(logs, root)
    print(f"{counts | {'kills': soak.kills}} in {SECONDS / 2:.0f} s")
    assert counts["saved"] and counts["read"]
