"""Ranks that die while they save, and what a restart finds.

A rank counts the calls by which a save changes the file system and kills itself, with SIGKILL,
before or after the one it was told; or its parent kills it at a random moment. The averages are a
formula of the step, so whoever reads a checkpoint knows what must be in it.
"""

from __future__ import annotations

import builtins
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sharded_ema import EMAError, ShardedEMA, latest_checkpoint
from sharded_ema.checkpoint import durable
from sharded_ema.checkpoint.run import committed, open_checkpoint
from sharded_ema.model.pieces import pieces_of
from sharded_ema.tools.consolidate import consolidate

WORLD = 2
SHAPES = {"0.weight": (7, 5), "0.bias": (7,), "1.weight": (1, 7), "1.bias": (1,)}
# A rank that has not ended by then hangs; one takes a second.
TIMEOUT = 90.0
NAMED_ERROR = 3
# The first save in a process imports the second one, which takes longer than the save.
PRELOADED = ["tests.helpers.crash", "torch._dynamo"]

# Module and name of the functions through which a save reaches the file system.
CALLS = [
    *((os, n) for n in ("mkdir", "rename", "replace", "fsync", "fdatasync", "write")),
    *((os, n) for n in ("unlink", "rmdir", "open")),
    (builtins, "open"),
]


@dataclass(frozen=True)
class Save:
    """What one start of the ranks does.

    Attributes:
        step: to save under ``step_<step>``, or under ``last`` with ``replace``.
        victims: ranks that die.
        call: the number of the call at which they do, from 1; 0 for no call.
        after: die after it, not before.
        delay: seconds after which the parent kills the victims; ``None`` for not.
    """

    step: int
    asynchronous: bool = False
    format: str = "safetensors"
    replace: bool = False
    victims: tuple[int, ...] = ()
    call: int = 0
    after: bool = False
    delay: float | None = None


def formula(name: str, step: int) -> Tensor:
    """The average of a parameter at a step, exact in fp32."""
    numel = int(np.prod(SHAPES[name]))
    values = torch.arange(numel, dtype=torch.float32) / 8 + step * 16 + len(name)
    return values.view(SHAPES[name])


class Counter:
    """Counts the calls of a process that change the file system, and ends it at one of them."""

    def __init__(self, call: int, after: bool) -> None:
        self.calls = 0
        self._call, self._after = call, after
        self._lock = threading.Lock()

    def _around(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._lock:  # files are sent to the disk from threads
            self.calls += 1
            fatal = self.calls == self._call
        if fatal and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    @contextmanager
    def installed(self) -> Iterator[None]:
        originals = [getattr(module, name) for module, name in CALLS]
        for (module, name), original in zip(CALLS, originals, strict=True):
            setattr(
                module, name, lambda *a, _original=original, **k: self._around(_original, *a, **k)
            )
        try:
            yield
        finally:
            for (module, name), original in zip(CALLS, originals, strict=True):
                setattr(module, name, original)


def rank_main(rank: int, store: str, folder: str, save: Save, pipe: Any) -> None:
    """Take up the last checkpoint, check it, go to the next step, save it, and say so."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    durable.FLUSH_BYTES = 1  # else no file here is large enough to be sent before its end
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    try:
        count = _rank_work(Path(folder), save, killed=rank in save.victims, pipe=pipe)
    except EMAError as error:
        pipe.send(f"{type(error).__name__}: {error}")
        # The others may be dead; a good end would wait for them.
        os._exit(NAMED_ERROR)
    pipe.send(count)
    if save.victims:
        os._exit(0)  # nobody may be left to say goodbye to
    dist.barrier()
    dist.destroy_process_group()


def _rank_work(folder: Path, save: Save, *, killed: bool, pipe: Any) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
    fully_shard(model)
    # What a dead rank leaves waiting in the store is found by this timeout alone.
    ema = ShardedEMA(model, 0.0, timeout=10.0)
    if committed(folder):
        step = ema.load(latest_checkpoint(folder), verify=True)
        check_local(ema, step)
    for name, parameter in model.named_parameters():
        local = parameter._local_tensor
        # fully_shard cuts rows as torch.chunk does: ceil(rows / world) for the first ranks.
        first = -(-SHAPES[name][0] // WORLD) * dist.get_rank()
        local.data.copy_(formula(name, save.step)[first : first + local.shape[0]])
    ema.update()  # with decay 0 the average is the parameters
    counter = Counter(save.call if killed else 0, save.after)
    target = folder / ("last" if save.replace else f"step_{save.step}")
    dist.barrier()
    pipe.send("saving")
    with counter.installed():
        handle = ema.save(
            target,
            step=save.step,
            asynchronous=save.asynchronous,
            format=save.format,
            replace=save.replace,
            keep_last=3,
        )
        if save.asynchronous:
            for _, parameter in model.named_parameters():
                parameter._local_tensor.data.zero_()
            ema.update()  # what is being written must not see this
        handle.result()
    ema.close()
    return counter.calls


def check_local(ema: ShardedEMA, step: int) -> None:
    """This rank's averages are those of the step."""
    for key, value in ema.state_dict().items():
        name = key.removeprefix("ema.")
        if name in SHAPES:
            for box, piece in pieces_of(value):
                rows = slice(box.offsets[0], box.offsets[0] + box.sizes[0])
                if not torch.equal(piece, formula(name, step)[rows]):
                    raise AssertionError(f"{key} is not that of step {step}")


def check_stored(path: Path, step: int) -> None:
    """What lies on disk is the average of the step, bit for bit, and all digests are right."""
    opened = open_checkpoint(path)
    for name in SHAPES:
        data = np.frombuffer(opened.tensors[f"ema.{name}"].read(), np.float32)
        expected = formula(name, step).reshape(-1).numpy()
        assert np.array_equal(data, expected), f"{path}: {name} is not that of step {step}"


def job_main(number: int, folder: str, saves: int, together: Any, pipe: Any) -> None:
    """A job of one process that saves to the same paths as another one."""
    warnings.simplefilter("ignore")
    ema = ShardedEMA(nn.Linear(3, 2), 0.9)
    found = []
    for step in range(saves):
        together.wait(TIMEOUT)
        try:
            ema.save(Path(folder, f"step_{step}"), step=100 * number + step)
            found.append("saved")
        except EMAError as error:
            found.append(type(error).__name__)
    pipe.send(found)


def consolidate_here(folder: str, call: int, after: bool, options: dict[str, Any]) -> Any:
    """Consolidate ``folder/c`` into ``folder/out`` and die at a call; else how many it took."""
    counter = Counter(call, after)
    try:
        with counter.installed():
            consolidate(Path(folder, "c"), Path(folder, "out"), **options)
    except EMAError as error:
        return f"{type(error).__name__}: {error}"
    return counter.calls


def serve_consolidations(pipe: Any) -> None:
    """Forks for each job; much cheaper than a new process of :mod:`multiprocessing` each."""
    while job := pipe.recv():
        ends = []
        for arguments in job:
            ours, theirs = multiprocessing.Pipe(duplex=False)
            pid = os.fork()
            if not pid:
                theirs.send(consolidate_here(*arguments))
                os._exit(0)
            theirs.close()
            ends.append((pid, ours))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in ends]
        pipe.send([(code, _receive(ours)) for code, (_, ours) in zip(codes, ends, strict=True)])


def race(folder: Path, saves: int) -> list[list[str]]:
    """Two jobs save to the same paths at the same time; what each of them met."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    together = context.Barrier(2)
    pipes = []
    for number in range(2):
        ours, theirs = context.Pipe()
        args = (number, str(folder), saves, together, theirs)
        context.Process(target=job_main, args=args, daemon=True).start()
        pipes.append(ours)
    assert all(pipe.poll(TIMEOUT) for pipe in pipes)
    return [pipe.recv() for pipe in pipes]


class Ranks:
    """Starts the ranks of one save after another; a fork each, so that a start takes a second."""

    def __init__(self, folder: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self.folder = folder

    def start(self, save: Save) -> tuple[list[int | None], list[Any]]:
        """Run one save; exit codes, and each rank's last word: its number of calls, if done."""
        processes, pipes = [], []
        with tempfile.TemporaryDirectory(prefix="sharded-ema-store-") as store:
            for rank in range(WORLD):
                ours, theirs = self._context.Pipe()
                process = self._context.Process(
                    target=rank_main,
                    args=(rank, f"{store}/store", str(self.folder), save, theirs),
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            words = [_first_word(pipe) for pipe in pipes]
            timers = []
            if save.delay is not None:
                for victim in save.victims:
                    timers.append(threading.Timer(save.delay, processes[victim].kill))
                    timers[-1].start()
            wait([p.sentinel for p in processes], TIMEOUT)
            for process in processes:
                process.join(TIMEOUT)
            for timer in timers:
                timer.cancel()
            hanging = [r for r, p in enumerate(processes) if p.exitcode is None]
            for process in processes:
                process.kill()
            assert not hanging, f"ranks {hanging} hang in {save}"
            words = [_last_word(p, w) for p, w in zip(pipes, words, strict=True)]
            return [p.exitcode for p in processes], words

    def save(self, save: Save) -> list[int]:
        """A save that must work; the number of calls of each rank."""
        codes, words = self.start(save)
        assert codes == [0] * WORLD, f"{save}: exit codes {codes}, {words}"
        return words


def _first_word(pipe: Any) -> Any:
    """Wait until a rank is about to save, or has failed before."""
    assert pipe.poll(TIMEOUT), "a rank does not come to its save"
    return _receive(pipe)


def _last_word(pipe: Any, last: Any) -> Any:
    while pipe.poll():
        word = _receive(pipe)
        if word is None:
            break
        last = word
    return last


def _receive(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def stress(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill ``kills`` saves; after each, all that is committed is right and the next save works.

    Returns:
        Counts of what happened.
    """
    draw = random.Random(seed)
    ranks = Ranks(folder)
    counts = {"killed": 0, "committed": 0, "survivors": 0, "points": 0}
    points: dict[tuple[bool, str, bool], list[tuple[int, int, bool]]] = {}
    steps: dict[Path, int] = {}
    step = 0
    for number in range(kills):
        kind = (draw.random() < 0.5, draw.choice(["safetensors", "dcp"]), draw.random() < 0.3)
        options: dict[str, Any] = dict(
            zip(("asynchronous", "format", "replace"), kind, strict=True)
        )
        step += 1
        # A save that works: what was killed before is no hindrance, and its leftovers go.
        calls = ranks.save(Save(step, **options))
        names = {path.name for path in folder.iterdir()}
        assert not [name for name in names if ".tmp-" in name or ".old-" in name], names
        assert (folder / "latest").read_text().strip() in names
        steps = {c.path: c.step for c in committed(folder)}
        last = latest_checkpoint(folder)
        assert steps[last] == step
        if kind not in points:
            # Every call of every rank, before and after it.
            points[kind] = [(r, c, a) for r in range(WORLD) for c in range(1, calls[r] + 1)
                            for a in (False, True)]  # fmt: skip
            draw.shuffle(points[kind])
            counts["points"] += len(points[kind])
        step += 1
        if number % 3 < 2 and points[kind]:
            victim, call, after = points[kind].pop()
            victims = (victim,) if draw.random() < 0.8 else (0, 1)
            save = Save(step, victims=victims, call=call, after=after, **options)
        else:
            victims = draw.choice([(0,), (1,), (0, 1)])
            save = Save(step, victims=victims, delay=draw.uniform(0, 0.08), **options)
        codes, words = ranks.start(save)
        counts["killed"] += -signal.SIGKILL in codes
        for rank, code in enumerate(codes):
            # A survivor has either finished or raised a named error.
            assert code in (0, NAMED_ERROR, -signal.SIGKILL), f"{save}: {rank} {code} {words}"
            counts["survivors"] += code == NAMED_ERROR
        now = {c.path: c.step for c in committed(folder)}
        for path, stored in now.items():
            check_stored(path, stored)
        newest = max(now.values(), default=-1)
        assert newest in (step - 1, step), f"{save} lost the last committed checkpoint: {now}"
        if any(code == 0 for code in codes):
            assert newest == step, f"{save}: a rank said that it was committed"
        counts["committed"] += newest == step
    return counts
