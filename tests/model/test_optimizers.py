"""Every way of stepping that PyTorch knows: counted once, or a warning that it was not."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim.optimizer import register_optimizer_step_post_hook

from sharded_ema import ShardedEMA
from sharded_ema.errors import EMAWarning

DECAY = 0.9
STILL = "no optimizer step was counted"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def backward(net: nn.Module, index: int = 0) -> Tensor:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(index))
    loss: Tensor = net(x).square().mean()
    loss.backward()
    return loss


def follow(net: nn.Module, ema: ShardedEMA, step: Callable[[int], object]) -> None:
    """Step and compare with the plain loop, bit for bit."""
    expected = {n: p.detach().clone() for n, p in net.named_parameters()}
    before = ema.num_updates
    for index in range(4):
        step(index)
        for name, parameter in net.named_parameters():
            expected[name].lerp_(parameter.detach(), 1 - DECAY)
    assert ema.num_updates == before + 4
    state = ema.state_dict()
    for name, parameter in net.named_parameters():
        assert torch.equal(state[f"ema.{name}"], expected[name])
        assert not torch.equal(parameter, expected[name])


class Container(torch.optim.Optimizer):
    """An optimizer made of optimizers, as in torchtitan.

    Args:
        in_backward: the ones inside step as soon as they have a gradient, ``step()`` does nothing.
    """

    def __init__(self, net: nn.Module, *, in_backward: bool = False) -> None:
        parameters = list(net.parameters())
        super().__init__(parameters, {})
        self.inner = [torch.optim.AdamW([p], lr=0.1) for p in parameters]
        self.in_backward = in_backward
        if in_backward:
            for parameter, optimizer in zip(parameters, self.inner, strict=True):
                parameter.register_post_accumulate_grad_hook(lambda _, o=optimizer: self.apply(o))  # type: ignore[misc]

    @staticmethod
    def apply(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step(self, closure: Any = None) -> None:
        if not self.in_backward:
            for optimizer in self.inner:
                optimizer.step()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_container_of_optimizers(in_backward: bool) -> None:
    net = model()
    optimizer = Container(net, in_backward=in_backward)
    ema = ShardedEMA(net, DECAY)
    ema.attach(optimizer)

    def step(index: int) -> None:
        backward(net, index)
        optimizer.step()
        optimizer.zero_grad()

    follow(net, ema, step)


def test_lbfgs_calls_its_closure_often_and_counts_once() -> None:
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=5)
    ema = ShardedEMA(net, DECAY)
    ema.attach(optimizer)
    calls = []

    def step(index: int) -> None:
        def closure() -> Tensor:
            calls.append(index)
            optimizer.zero_grad()
            return backward(net, index).detach()

        optimizer.step(closure)

    follow(net, ema, step)
    assert len(calls) > 2 * 4


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_steps(whole: bool) -> None:
    """The optimizer is compiled, the average is not: it is rounded as without a compiler."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = ShardedEMA(net, DECAY)
    ema.attach(optimizer)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    def train(x: Tensor) -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    if whole:
        compiled = torch.compile(train, backend=backend)
        follow(net, ema, lambda index: compiled(torch.full((3, 4), 1.0 + index)))
    else:
        stepping = torch.compile(optimizer.step, backend=backend)
        follow(net, ema, lambda index: (backward(net, index), stepping(), optimizer.zero_grad()))
    assert "add_" in graphs[-1]
    assert len(graphs) == (2 if whole else 1), "nothing of the average"


def test_update_in_a_compiled_function() -> None:
    """It stays out of the graph, as the hooks do, and with it the number of steps so far."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = ShardedEMA(net, DECAY)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    @torch.compile(backend=backend)
    def train(x: Tensor) -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    follow(net, ema, lambda index: train(torch.full((3, 4), 1.0 + index)))
    assert graphs
    assert not any("lerp" in code or "isfinite" in code for code in graphs)


@pytest.fixture
def everywhere() -> Iterator[list[type]]:
    """What steps, by a hook on all optimizers."""
    seen: list[type] = []
    handle = register_optimizer_step_post_hook(lambda o, *_: seen.append(type(o)))
    yield seen
    handle.remove()


def test_schedulers_wrappers_loaded_states_and_global_hooks(everywhere: list[type]) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    before = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    ema = ShardedEMA(net, DECAY)
    ema.attach(optimizer)
    after = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    plain = optimizer.step

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    optimizer.step = wrapped  # type: ignore[method-assign]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def step(index: int) -> None:
        backward(net, index)
        optimizer.step()
        optimizer.zero_grad()
        before.step()
        after.step()

    follow(net, ema, step)
    assert everywhere == [torch.optim.AdamW] * 4


def test_one_optimizer_per_parameter_that_steps_in_the_backward() -> None:
    net = model()
    container = Container(net, in_backward=True)
    ema = ShardedEMA(net, DECAY)
    ema.attach(*container.inner)
    follow(net, ema, lambda index: backward(net, index))


def test_apply_optimizer_in_backward_with_explicit_updates() -> None:
    net = model()
    _apply_optimizer_in_backward(torch.optim.AdamW, net.parameters(), {"lr": 0.1})
    ema = ShardedEMA(net, DECAY)
    follow(net, ema, lambda index: (backward(net, index), ema.update()))


# ---------------------------------------------------------------------- steps that nobody counts


def attached_too_high(net: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    """The optimizer that is attached never steps: those in the backward do."""
    idle = torch.optim.AdamW(net.parameters(), lr=0.1)
    _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.1})
    return idle, lambda: backward(net)


def replaced(net: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    first = torch.optim.AdamW(net.parameters(), lr=0.1)
    second = torch.optim.AdamW(net.parameters(), lr=0.1)
    return first, lambda: (backward(net), second.step())


def unpickled(net: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    """A copy has no hooks; here of an optimizer that is given the model's parameters again."""
    first = torch.optim.AdamW(net.parameters(), lr=0.1)
    second: list[torch.optim.Optimizer] = []

    def step() -> None:
        if not second:
            second.append(pickle.loads(pickle.dumps(first)))
            second[0].param_groups[0]["params"] = list(net.parameters())
        backward(net)
        second[0].step()

    return first, step


def copied(net: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    first = torch.optim.AdamW(net.parameters(), lr=0.1)
    second: list[torch.optim.Optimizer] = []

    def step() -> None:
        if not second:
            memo = {id(p): p for p in net.parameters()}
            second.append(copy.deepcopy(first, memo))
        backward(net)
        second[0].step()

    return first, step


def bypassed(net: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    raw = torch.optim.AdamW.step.__wrapped__  # type: ignore[attr-defined]
    return optimizer, lambda: (backward(net), raw(optimizer))


LOOKS: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "metrics": lambda ema, path: ema.metrics(),
    "save": lambda ema, path: ema.save(path / "x", step=1, replace=True),
    "swap": lambda ema, path: ema.swap().__enter__(),
    "close": lambda ema, path: ema.close(),
}


@pytest.mark.parametrize("make", [attached_too_high, replaced, unpickled, copied, bypassed])
@pytest.mark.parametrize("look", LOOKS)
def test_an_attached_optimizer_that_does_not_step(make: Any, look: str, tmp_path: Path) -> None:
    net = model()
    optimizer, step = make(net)
    ema = ShardedEMA(net, DECAY)
    ema.attach(optimizer)
    ema.metrics()
    step()
    assert ema.num_updates == 0
    with pytest.warns(EMAWarning, match=f"{STILL} after step 0, .* the attached optimizer is not"):
        LOOKS[look](ema, tmp_path)


@pytest.mark.parametrize("make", [replaced, unpickled, copied, bypassed])
def test_the_average_stalls_later(make: Any) -> None:
    net = model()
    optimizer, step = make(net)
    ema = ShardedEMA(net, DECAY)
    ema.attach(optimizer)
    for index in range(3):
        backward(net, index)
        optimizer.step()
        ema.metrics()
    step()
    with pytest.warns(EMAWarning, match=f"{STILL} after step 3"):
        ema.metrics()
    step()
    ema.metrics()  # said once


def test_nobody_calls_update(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step() -> None:
        backward(net)
        optimizer.step()

    ema = ShardedEMA(net, DECAY)
    for _ in range(3):
        step()
        ema.metrics()  # between a step and its update, which is no mistake
        ema.update()
    for _ in range(2):
        step()
        ema.metrics()
    step()
    with pytest.warns(EMAWarning, match=rf"{STILL} after step 3, .* ema\.update\(\)"):
        ema.save(tmp_path / "x", step=5)
    forgotten = ShardedEMA(net, DECAY)
    step()
    with pytest.warns(EMAWarning, match=f"{STILL} after step 0"):
        forgotten.close()


def test_changes_of_the_weights_that_are_no_mistake(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = ShardedEMA(net, DECAY, buffers="average")
    ema.attach(optimizer)
    backward(net)
    optimizer.step()
    ema.save(tmp_path / "x", step=1)
    weights = {n: t.clone() for n, t in net.state_dict().items()}
    backward(net)  # batch statistics move with every forward
    ema.metrics()
    ema.copy_to()
    ema.metrics()
    ema.load(tmp_path / "x")
    net.load_state_dict(weights)  # after the average, as many programs do
    ema.metrics()
    net.bfloat16()
    ema.metrics()
    with torch.no_grad():
        net[0].bias[0] = torch.nan  # type: ignore[index, operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EMAWarning)
        ema.update()
    for _ in range(3):
        with ema.swap():
            pass
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*kept out", category=EMAWarning)
        ema.close()
