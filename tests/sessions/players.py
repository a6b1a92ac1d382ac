"""Plays a session on the ranks of a layout, and compares every answer with the oracle's."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sharded_ema import ShardedEMA, consolidate, verify
from sharded_ema.averaging.kernels import batches
from sharded_ema.averaging.kernels.fused import FusedTable
from sharded_ema.errors import EMAError, RanksDifferError, StateError, SwapError
from tests.helpers import layouts
from tests.helpers.layouts import rank, world
from tests.sessions.oracle import Oracle, Tensors


@dataclass(frozen=True)
class Session:
    """What a user does, in order.

    Attributes:
        layout: a row of :data:`LAYOUTS`.
        schedules: by profile.
        optimizers: how many train the model, attached together; 0: one, and explicit updates.
        actions: names of methods of :class:`Player`, each with a number that it may use to choose.
    """

    layout: str
    schedules: tuple[tuple[str, str], ...]
    update_every: int
    start_step: int
    optimizers: int
    actions: tuple[tuple[str, int], ...]


class Trainee(Protocol):
    """A model in training, of any framework."""

    target: Any
    optimizers: list[Any]
    module: torch.nn.Module

    def step(self, index: int, between: Callable[[], None]) -> None:
        """One optimizer step; ``between`` is called between the steps of two optimizers."""

    def trained(self) -> Tensors:
        """What the optimizer trains, whole."""

    def weights(self) -> Tensors:
        """The trainable parameters of the model, whole."""

    def evaluate(self) -> Tensor:
        """A forward."""


class Both:
    """Two optimizers, each of half of the parameters, that a user steps one after another."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = optimizer.param_groups[0]["params"]
        half = len(parameters) // 2
        self.halves = [
            torch.optim.AdamW(p, lr=1e-2) for p in (parameters[:half], parameters[half:])
        ]
        self.between: Callable[[], None] = lambda: None

    def step(self) -> None:
        self.halves[0].step()
        self.between()
        self.halves[1].step()

    def zero_grad(self) -> None:
        for half in self.halves:
            half.zero_grad()


class Torch:
    """A model that torch optimizers train."""

    def __init__(self, mode: str, optimizers: int) -> None:
        self.run = layouts.build(mode)
        self.target, self.module = self.run.target, self.run.bare
        self.optimizers = [self.run.optimizer]
        self.both: Both | None = None
        if optimizers == 2:
            self.both = Both(self.run.optimizer)
            self.run.optimizer = self.both  # type: ignore[assignment]
            self.optimizers = self.both.halves

    def step(self, index: int, between: Callable[[], None]) -> None:
        if self.both:
            self.both.between = between
        self.run.step(index)

    def trained(self) -> Tensors:
        return self.run.gather()

    weights = trained

    def evaluate(self) -> Tensor:
        return self.run.evaluate()


class DeepSpeed:
    """A model that an engine trains."""

    def __init__(self, stage: int) -> None:
        from tests.helpers import engines

        self.engine = engines.build(stage, "bf16")
        self.target, self.module = self.engine.engine, self.engine.module
        self.optimizers: list[Any] = []

    def step(self, index: int, between: Callable[[], None]) -> None:
        self.engine.step(index)

    def trained(self) -> Tensors:
        return self.engine.masters()

    def weights(self) -> Tensors:
        trained = {n for n, p in self.module.named_parameters() if p.requires_grad}
        return {n: w for n, w in self.engine.weights().items() if n in trained}

    def evaluate(self) -> Tensor:
        return self.engine.evaluate()


#: Layouts, with the number of their ranks and whether an engine trains them.
LAYOUTS: dict[str, tuple[int, Callable[[int], Trainee]]] = {
    "plain": (1, lambda n: Torch("plain", n)),
    "fsdp2": (2, lambda n: Torch("fsdp2", n)),
    "fsdp2_mixed": (2, lambda n: Torch("fsdp2_mixed", n)),
    "ddp": (2, lambda n: Torch("ddp", n)),
    "ddp_bf16": (2, lambda n: Torch("ddp_bf16", n)),
    "tp": (2, lambda n: Torch("tp", n)),
    "fsdp1": (2, lambda n: Torch("fsdp1", n)),
    "fsdp1_flat": (2, lambda n: Torch("fsdp1_flat", 1 if n == 2 else n)),
    "hsdp": (4, lambda n: Torch("hsdp", n)),
    "zero1": (2, lambda n: DeepSpeed(1)),
    "zero3": (2, lambda n: DeepSpeed(3)),
}
ENGINES = ("zero1", "zero3")


class Interrupted(BaseException):
    """A key that a user presses in the middle."""


def play(session: Session, folder: str) -> str | None:
    """Play a session on this rank; all ranks of the world do.

    Returns:
        What was wrong, the same on all ranks; ``None`` if nothing was.
    """
    player = Player(session, Path(folder))
    last = ("export", len(session.actions))
    for number, (name, choice) in enumerate((*session.actions, last)):
        wrong = None
        try:
            getattr(player, name)(choice)
        except AssertionError as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{frame.name}: {frame.line}: {error}"
        told: list[str | None] = [wrong]
        if world() > 1:
            told = [None] * world()
            dist.all_gather_object(told, wrong)
        if any(told):
            return f"action {number}, {name}({choice}): {told}"
    player.end()
    return None


class Player:
    """One rank's part in a session. Every action leaves model and average usable."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session = session
        self.folder = folder
        self.trainee = LAYOUTS[session.layout][1](session.optimizers)
        self.options = layouts_options(session)
        self.steps = 0
        self.saves: list[tuple[Path, Oracle, dict[str, Tensor]]] = []
        self.waiting: list[Any] = []
        self.ema, self.oracle = self.made()

    def made(self) -> tuple[ShardedEMA, Oracle]:
        s = self.session
        ema = ShardedEMA(self.trainee.target, dict(s.schedules), **self.options)
        weights = self.trainee.trained()
        oracle = Oracle(dict(s.schedules), s.update_every, s.start_step, weights)
        if s.optimizers or s.layout in ENGINES:
            ema.attach(*self.trainee.optimizers)
        return ema, oracle

    @property
    def is_attached(self) -> bool:
        return bool(self.session.optimizers) or self.session.layout in ENGINES

    def end(self) -> None:
        self.ema.close()

    # ------------------------------------------------------------------ training

    def step(self, choice: int) -> None:
        """A step, with a look between the two halves of it."""
        self.trained_step(between=lambda: self.look(choice) if choice % 2 else None)

    def trained_step(self, between: Callable[[], None] = lambda: None) -> None:
        self.steps += 1
        self.trainee.step(self.steps, between)
        if not self.is_attached:
            self.ema.update()
        self.oracle.step(self.trainee.trained())
        self.compare()

    def evaluate(self, choice: int) -> None:
        self.trainee.evaluate()

    def gather_ahead(self, choice: int) -> None:
        """A gather is under way when the next thing happens."""
        units = [m for m in self.trainee.module.modules() if isinstance(m, FSDPModule)]
        if units:
            units[choice % len(units)].unshard(async_op=True)

    def poison(self, choice: int) -> None:
        """An element is NaN for one update."""
        if self.is_attached or self.oracle.seeded is None or self.session.layout != "plain":
            return
        parameter = list(self.trainee.module.parameters())[choice % 3]
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[choice % parameter.numel()] = float("nan")
        self.ema.update()
        self.oracle.step(self.trainee.trained())
        with torch.no_grad():
            parameter.copy_(kept)
        self.compare()

    # ------------------------------------------------------------------ looking

    def compare(self) -> None:
        """The counters, and that the average is right at the next look."""
        assert self.ema.num_updates == self.oracle.num_updates

    def look(self, choice: int) -> None:
        """Reading changes nothing."""
        before = self.ema.num_updates
        if choice % 3 == 0:
            self.ema.metrics()
        elif choice % 3 == 1:
            self.ema.state_dict()
        else:
            self.ema.metrics(distance=True)
        assert self.ema.num_updates == before

    def swap(self, choice: int) -> None:
        profile, average = self.chosen(choice)
        before, forward = self.trainee.weights(), self.trainee.evaluate()
        with self.ema.swap(profile):
            same(self.trainee.weights(), in_dtype(average, before))
            if choice % 2:
                self.trainee.evaluate()
        same(self.trainee.weights(), before)
        assert torch.equal(self.trainee.evaluate(), forward)

    def leave_by_error(self, choice: int) -> None:
        """One rank leaves a swap with an exception, at which nothing is lost."""
        profile, _ = self.chosen(choice)
        before = self.trainee.weights()
        with suppress(ZeroDivisionError, SwapError), self.ema.swap(profile):
            if choice % world() == rank():
                raise ZeroDivisionError
        same(self.trainee.weights(), before)

    def refused_in_swap(self, choice: int) -> None:
        """What needs the weights is refused while the average stands in, and harms nothing."""
        profile, _ = self.chosen(choice)
        refused = [self.ema.update, self.ema.reseed, lambda: self.ema.copy_to(profile)]
        with self.ema.swap(profile), expect(SwapError):
            refused[choice % 3]()
        self.compare()

    def second_average(self, choice: int) -> None:
        """Another average of the same model must not meet this one in a swap."""
        if self.session.layout in ENGINES:
            return
        other = ShardedEMA(self.trainee.target, 0.5, **self.options)
        profile, average = self.chosen(choice)
        before = self.trainee.weights()
        with self.ema.swap(profile):
            for refused in (other.update, other.reseed, lambda: other.swap().__enter__()):
                with expect(SwapError):
                    refused()
            same(self.trainee.weights(), in_dtype(average, before))
        same(self.trainee.weights(), before)
        other.close()

    # ------------------------------------------------------------------ weights from elsewhere

    def reseed(self, choice: int) -> None:
        self.ema.reseed()
        self.oracle.reseed(self.trainee.trained())
        self.compare()

    def edit(self, choice: int) -> None:
        """Other weights are loaded; a user then starts the average anew."""
        if self.session.layout in ENGINES:
            return
        with torch.no_grad():
            for parameter in self.trainee.module.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.0 + 0.25 * (choice % 4))
        self.reseed(choice)

    def edit_at_first(self, choice: int) -> None:
        """Weights that are loaded before anything was trained are what is averaged."""
        if self.session.layout in ENGINES or self.steps or self.oracle.applied:
            return
        with torch.no_grad():
            for parameter in self.trainee.module.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5)
        before = self.trainee.trained()
        if self.is_attached:  # the next step notices it
            self.oracle.reseed(before)
            self.trained_step()
        else:
            self.reseed(choice)

    def copy_to(self, choice: int) -> None:
        profile, average = self.chosen(choice)
        before = self.trainee.weights()
        self.ema.copy_to(profile)
        same(self.trainee.weights(), in_dtype(average, before))

    # ------------------------------------------------------------------ checkpoints

    def save(self, choice: int) -> None:
        path = self.folder / f"step_{len(self.saves)}"
        self.oracle.look(self.trainee.trained())
        format = "dcp" if choice % 5 == 0 else "safetensors"
        handle = self.ema.save(path, step=self.steps, asynchronous=bool(choice % 2), format=format)
        if choice % 2:
            self.waiting.append(handle)
        self.saves.append((path, self.oracle.remembered(), {}))

    def save_in_swap(self, choice: int) -> None:
        profile, average = self.chosen(choice)
        before = self.trainee.weights()
        with self.ema.swap(profile):
            self.save(choice)
            same(self.trainee.weights(), in_dtype(average, before))

    def load(self, choice: int) -> None:
        if not self.saves:
            return
        path, kept, _ = self.saves[choice % len(self.saves)]
        assert self.ema.load(path) >= 0
        self.oracle = kept.remembered()
        self.compare()

    def resume(self, choice: int) -> None:
        """A new object takes up a checkpoint."""
        if not self.saves or self.session.layout in ENGINES:
            return
        self.ema.close()
        self.ema, self.oracle = self.made()
        self.load(choice)

    def export(self, choice: int) -> None:
        """The export of a checkpoint is the average as it was."""
        if not self.saves:
            return
        self.settle()
        path, kept, _ = self.saves[choice % len(self.saves)]
        profile = sorted(kept.averages)[choice % len(kept.averages)]
        if rank() == 0:
            out = self.folder / "export"
            shutil.rmtree(out, ignore_errors=True)
            assert verify(path).ok
            consolidate(path, out, profile=profile, progress=False)
            got = load_file(out / "model.safetensors")
            for name, value in kept.averages[profile].items():
                assert torch.equal(got[name], value), f"{path.name} has another {name}"

    def settle(self) -> None:
        """Asynchronous saves are there."""
        for handle in self.waiting:
            handle.result()
        self.waiting.clear()
        if world() > 1:
            dist.barrier()

    # ------------------------------------------------------------------ faults

    def interrupt(self, choice: int) -> None:
        """An update ends in the middle; the average is of no use until it begins anew."""
        if self.is_attached or self.oracle.seeded is None or self.session.update_every > 1:
            return
        with (
            suppress(Interrupted),
            _ending_early(batches, "foreach_lerp_"),
            _ending_early(FusedTable, "lerp"),
        ):
            self.ema.update()
        with expect(StateError):
            self.ema.swap(self.chosen(choice)[0]).__enter__()
        with expect(StateError):
            self.ema.state_dict()
        self.oracle.applied += 1
        if self.saves and choice % 2:
            self.load(choice)
        else:
            self.reseed(choice)

    def fall_apart(self, choice: int) -> None:
        """One rank counts a step that the others do not; no checkpoint is made of that."""
        if self.is_attached or world() == 1:
            return
        if choice % world() == rank():
            self.ema.update()
        path = self.folder / "apart"
        with expect(RanksDifferError):
            self.ema.save(path, step=1)
        assert not path.exists()
        self.ema.close()
        self.ema, self.oracle = self.made()

    def other_paths(self, choice: int) -> None:
        """The ranks name different paths."""
        if world() == 1:
            return
        path = self.folder / f"rank_{rank()}"
        with expect(RanksDifferError):
            self.ema.save(path, step=1)
        assert not path.exists()

    def fail_on_one(self, choice: int) -> None:
        """A save that is wrong on one rank fails on all, and the next one works."""
        step: Any = "one" if choice % world() == rank() else 1
        with expect(EMAError):
            self.ema.save(self.folder / "failed", step=step)
        assert not (self.folder / "failed").exists()

    # ------------------------------------------------------------------ helpers

    def chosen(self, choice: int) -> tuple[str, Tensors]:
        """One of the profiles, and its average as somebody sees it who looks now."""
        self.oracle.look(self.trainee.trained())
        profile = sorted(self.oracle.averages)[choice % len(self.oracle.averages)]
        return profile, self.oracle.averages[profile]


def layouts_options(session: Session) -> dict[str, Any]:
    """What a session's average is made with, beside its schedules."""
    return {
        "update_every": session.update_every,
        "start_step": session.start_step,
        "timeout": 60.0,
    }


@contextmanager
def expect(error: type[BaseException]) -> Iterator[None]:
    """The block must raise this error."""
    try:
        yield
    except error:
        return
    raise AssertionError(f"no {error.__name__}")


@contextmanager
def _ending_early(owner: Any, name: str) -> Iterator[None]:
    """What moves the average is interrupted after its first call."""
    right = getattr(owner, name)

    def broken(*args: Any, **options: Any) -> None:
        right(*args, **options)
        raise Interrupted

    setattr(owner, name, broken)
    try:
        yield
    finally:
        setattr(owner, name, right)


def in_dtype(average: Tensors, like: Tensors) -> Tensors:
    return {name: average[name].to(value.dtype) for name, value in like.items()}


def same(got: Tensors, want: Tensors) -> None:
    for name, value in want.items():
        assert torch.equal(got[name], value), f"another {name}"
