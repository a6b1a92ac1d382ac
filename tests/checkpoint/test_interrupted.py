"""Ctrl-C at any call of a save or load: it stays what it is, and nothing is left half done."""

from __future__ import annotations

import gc
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_ema import ShardedEMA, verify
from sharded_ema.checkpoint import run
from sharded_ema.errors import EMAError, StateError
from tests.helpers.layouts import build, rank
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]
FORMATS = ("safetensors", "dcp")
DCP = "torch.distributed.checkpoint."
# What these raise is dropped by the io module, which calls them for a buffer and when a stream is
# deleted; so is what a generator raises that is closed.
FORGOTTEN = ("seek", "tell", "readable", "seekable", "readinto", "close")
EVERYWHERE = ("sharded_ema.", DCP)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call makes as many calls as the one that was counted: each reads all manifests."""
    monkeypatch.setattr(run, "identity", lambda location: None)


class Calls:
    """Counts the calls of functions in some modules, and interrupts one of them."""

    def __init__(self, wanted: int | None, modules: tuple[str, ...]) -> None:
        self.count = 0
        self._wanted = wanted
        self._modules = modules

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_flags & inspect.CO_GENERATOR:
            return
        if code.co_name in FORGOTTEN and isinstance(frame.f_locals.get("self"), io.IOBase):
            return
        if event == "call" and str(frame.f_globals.get("__name__")).startswith(self._modules):
            if _in_finalizer(frame):
                return
            self.count += 1
            if self.count == self._wanted:
                raise KeyboardInterrupt


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether nobody would see what is raised: as in a ``__del__``."""
    while frame is not None and frame.f_globals.get("__name__") != "weakref":
        frame = frame.f_back
    return frame is not None


@contextmanager
def interrupted_at(wanted: int | None, modules: tuple[str, ...] = EVERYWHERE) -> Iterator[Calls]:
    calls = Calls(wanted, modules)
    gc.disable()  # what is raised in a __del__ goes nowhere
    sys.setprofile(calls)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        gc.enable()


def points(
    call: Callable[[str], object], number: int, modules: tuple[str, ...] = EVERYWHERE, last: int = 0
) -> list[int]:
    """Calls spread evenly over those that something makes, and the ``last`` ones."""
    call("first")  # which makes what later ones find
    with interrupted_at(None, modules) as calls:
        call("counted")
    assert calls.count > 2 * number
    step = calls.count // number
    return [*range(1, calls.count - step, step), *range(calls.count - last, calls.count)]


def average() -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return model, ShardedEMA(model, 0.5)


def whole_or_absent(path: Path) -> None:
    assert not path.exists() or verify(path).ok


@pytest.mark.parametrize("format", FORMATS)
def test_a_save_that_is_interrupted(tmp_path: Path, format: str) -> None:
    _, ema = average()

    def save(name: str) -> object:
        return ema.save(tmp_path / name, step=1, format=format)

    for point in points(save, 60, last=10):
        path = tmp_path / f"at {point}"
        with interrupted_at(point), pytest.raises(KeyboardInterrupt):
            save(path.name)
        whole_or_absent(path)
    save("last")
    names = {entry.name for entry in tmp_path.iterdir()} - {"latest"}
    assert all(verify(tmp_path / name).ok for name in names), "and what was left is gone"


def test_a_save_that_replaces_is_interrupted(tmp_path: Path) -> None:
    _, ema = average()

    def save(step: int) -> object:
        return ema.save(tmp_path / "x", step=step, replace=True)

    save(0)
    for point in points(lambda _: save(1), 40):
        with interrupted_at(point), pytest.raises(KeyboardInterrupt):
            save(2)
        assert ema.load(tmp_path / "x") in (0, 1, 2)


def test_an_asynchronous_save_that_is_interrupted(tmp_path: Path) -> None:
    """In the call itself, and while its result is waited for."""
    _, ema = average()

    def save(name: str) -> object:
        return ema.save(tmp_path / name, step=1, asynchronous=True).result()

    for point in points(save, 30):
        with interrupted_at(point), pytest.raises(KeyboardInterrupt):
            save(f"at {point}")
    ema.close()  # waits for what is under way
    for path in tmp_path.iterdir():
        assert path.name == "latest" or verify(path).ok


@pytest.mark.parametrize("format", FORMATS)
def test_a_load_that_is_interrupted(tmp_path: Path, format: str) -> None:
    model, ema = average()
    ema.save(tmp_path / "x", step=1, format=format)
    saved = {k: v.clone() for k, v in ema.state_dict().items()}
    with torch.no_grad():
        model[0].weight.add_(4)
    ema.update()
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    for point in points(lambda _: ema.load(tmp_path / "x"), 60):
        ema.load_state_dict(before)
        with interrupted_at(point), pytest.raises(KeyboardInterrupt):
            ema.load(tmp_path / "x")
        try:
            found = ema.state_dict()
        except StateError:
            continue
        values = {k: v for k, v in found.items() if k.startswith("ema.")}
        assert any(
            all(torch.equal(v, each[k]) for k, v in values.items()) for each in (before, saved)
        ), "unusable, or wholly before or after the load"


# ---------------------------------------------------------------------- several ranks


def one_rank_is_interrupted(mode: str, folder: str) -> list[tuple[str, str]]:
    """Rank 1 is, at many points in DCP; says what each met."""
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, timeout=60.0)
    root, found = Path(folder), []

    def act(name: str) -> object:
        return ema.save(root / name, step=1)

    where: list[list[int]] = [points(act, 8, (DCP,))]
    dist.broadcast_object_list(where, src=1)
    for point in where[0]:
        try:
            with interrupted_at(point if rank() == 1 else None, (DCP,)):
                act(f"at {point}")
        except (KeyboardInterrupt, EMAError) as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("nothing", ""))
        dist.barrier()
        if rank() == 0:
            whole_or_absent(root / f"at {point}")
        dist.barrier()
    ema.save(root / "last", step=1)  # all can go on together
    assert ema.load(root / "last") == 1
    ema.close()
    return found


@pytest.mark.parametrize("mode", ["fsdp2", "ddp"])
def test_the_others_hear_of_it(worlds: Worlds, mode: str, tmp_path: Path) -> None:
    others, interrupted = worlds[2].run(one_rank_is_interrupted, mode, str(tmp_path))
    assert {name for name, _ in interrupted} == {"KeyboardInterrupt"}
    assert [name for name, _ in others].count("nothing") < len(others) // 2
    for name, message in others:
        assert name == "nothing" or name.endswith("Error"), message
