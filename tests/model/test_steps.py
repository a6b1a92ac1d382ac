"""What counts as an applied optimizer step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from sharded_ema import ShardedEMA
from sharded_ema.errors import EMAWarning, OptimizerError, StateError, SwapError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def backward(net: nn.Module) -> None:
    net(torch.randn(3, 4)).square().mean().backward()


class Parent(torch.optim.SGD):
    """A subclass whose step() calls its parent's: PyTorch runs the hooks of both."""

    fail = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.fail:
            raise KeyError("after the inner step")
        return result


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
        lambda p: Parent(p, lr=0.1),
    ],
)
def test_once_per_step(make: Any) -> None:
    net = model()
    optimizer = make(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    ema = ShardedEMA(net, 0.9)
    handle = ema.attach(optimizer)
    for _ in range(3):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert ema.num_updates == 3
    handle.remove()
    backward(net)
    optimizer.step()
    assert ema.num_updates == 3
    ema.update()
    assert ema.num_updates == 4


def test_a_step_that_raised_does_not_confuse_the_next() -> None:
    net = model()
    optimizer = Parent(net.parameters(), lr=0.1)
    ema = ShardedEMA(net, 0.9)
    ema.attach(optimizer)
    backward(net)
    optimizer.step()
    optimizer.fail = True
    with pytest.raises(KeyError):
        optimizer.step()
    optimizer.fail = False
    before = ema.num_updates
    for _ in range(3):
        optimizer.step()
    assert ema.num_updates == before + 3


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_do_not_count(fused: bool) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    ema = ShardedEMA(net, 0.9)
    ema.attach(optimizer)
    counts = []
    for index in range(4):
        scaler.scale(net(torch.randn(3, 4)).square().mean()).backward()
        if index == 1:
            next(net.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
        before = [t.clone() for t in ema.state_dict().values() if t.is_floating_point()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if index == 1:
            after = [t for t in ema.state_dict().values() if t.is_floating_point()]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        counts.append(ema.num_updates)
    assert counts == [1, 1, 2, 3]
    assert ema.metrics()["ema/skipped_steps"] == (1 if fused else 0)


def test_gradient_accumulation() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = ShardedEMA(net, 0.9)
    ema.attach(optimizer)
    for micro in range(8):
        backward(net)
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert ema.num_updates == 2


def test_several_optimizers_make_one_update() -> None:
    net = model()
    first = torch.optim.SGD(net[0].parameters(), lr=0.1)  # type: ignore[index]
    second = torch.optim.AdamW(net[1].parameters(), lr=0.1)  # type: ignore[index]
    ema = ShardedEMA(net, 0.5)
    ema.attach(first, second)
    expected = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(3):
        backward(net)
        first.step()
        second.step()
        for name, parameter in net.named_parameters():
            expected[name].lerp_(parameter.detach(), 0.5)
    assert ema.num_updates == 3
    assert all(torch.equal(ema.state_dict()[f"ema.{n}"], t) for n, t in expected.items())
    first.step()
    assert ema.num_updates == 3
    first.step()  # stepped twice while the other did not: the pending update comes first
    assert ema.num_updates == 4
    with ema.swap():  # who only looks ends no round
        pass
    assert ema.num_updates == 4
    ema.close()
    assert ema.num_updates == 5


def test_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = ShardedEMA(net, 0.9)
    ema.attach(Wrapper(optimizer))
    backward(net)
    optimizer.step()
    assert ema.num_updates == 1


class Posing:
    """Poses as the class of the optimizer inside and shares its hooks, as Lightning does."""

    __module__ = "lightning.pytorch.core.optimizer"

    def __init__(self, optimizer: torch.optim.Optimizer, *, copied: bool) -> None:
        if copied:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        self.optimizer = optimizer
        self.__class__ = type("Posing", (Posing, type(optimizer)), {"__module__": self.__module__})

    def step(self) -> None:
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)


@pytest.mark.parametrize("copied", [False, True])
def test_wrappers_that_pose_as_the_optimizer(copied: bool) -> None:
    net = model()
    optimizer = Posing(torch.optim.SGD(net.parameters(), lr=0.1), copied=copied)
    ema = ShardedEMA(net, 0.9)
    ema.attach(optimizer)
    for _ in range(2):
        backward(net)
        optimizer.step()
    assert ema.num_updates == 2


class Lookahead(torch.optim.Optimizer):
    """Its weights are those of the optimizer inside only until it goes half of the way back."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        for slow, fast in zip(self.slow, self.param_groups[0]["params"], strict=True):
            fast.copy_(slow.lerp_(fast, 0.5))


def test_a_wrapper_that_may_change_weights_itself_is_refused() -> None:
    net = model()
    optimizer = Lookahead(torch.optim.SGD(net.parameters(), lr=0.1))
    ema = ShardedEMA(net, 0.9)
    with pytest.raises(OptimizerError, match="Lookahead wraps an optimizer and has no step hooks"):
        ema.attach(optimizer)
    ema.attach(optimizer.optimizer)


class WithoutInit(torch.optim.SGD):
    """As PostLocalSGDOptimizer, which holds its optimizer under another name."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]


def test_an_optimizer_without_hooks_is_refused() -> None:
    net = model()
    with pytest.raises(OptimizerError, match=r"is no torch\.optim\.Optimizer with step hooks"):
        ShardedEMA(net, 0.9).attach(WithoutInit(net.parameters()))


def test_optimizers_that_cannot_drive_the_average_are_refused() -> None:
    net = model()
    ema = ShardedEMA(net, 0.9)
    with pytest.raises(OptimizerError, match="owns none of the 4 averaged parameters"):
        ema.attach(torch.optim.SGD(model().parameters(), lr=0.1))
    with pytest.raises(OptimizerError, match="needs the optimizer"):
        ema.attach()
    with pytest.raises(OptimizerError, match="is no torch"):
        ema.attach("adam")
    with pytest.warns(EMAWarning, match="2 averaged parameters belong to no attached optimizer"):
        ema.attach(torch.optim.SGD(net[0].parameters(), lr=0.1))  # type: ignore[index]
    with pytest.raises(StateError, match="already attached"):
        ema.attach(torch.optim.SGD(net.parameters(), lr=0.1))


def test_no_step_inside_a_swap() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = ShardedEMA(net, 0.9)
    ema.attach(optimizer)
    backward(net)
    optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    backward(net)
    with pytest.raises(SwapError, match="an optimizer step"), ema.swap():
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    optimizer.step()
    assert ema.num_updates == 2


def test_update_beside_an_attached_optimizer_warns() -> None:
    net = model()
    ema = ShardedEMA(net, 0.9)
    ema.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.warns(EMAWarning, match="counts twice"):
        ema.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update()


def test_a_handle_removes_once() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = ShardedEMA(net, 0.9)
    old = ema.attach(optimizer)
    old.remove()
    ema.attach(optimizer)
    old.remove()
    with pytest.raises(StateError, match="already attached"):
        ema.attach(optimizer)
    backward(net)
    optimizer.step()
    assert ema.num_updates == 1
    ema.close()
    optimizer.step()


def test_several_optimizers_stay_in_step_when_one_is_skipped() -> None:
    net = model()
    first = torch.optim.SGD(net[0].parameters(), lr=0.1)  # type: ignore[index]
    second = torch.optim.SGD(net[1].parameters(), lr=0.1)  # type: ignore[index]
    ema = ShardedEMA(net, 0.0)
    ema.attach(first, second)
    for round_ in range(6):
        backward(net)
        if round_ != 2:  # a GradScaler that found Inf does not call step()
            first.step()
        second.step()
    state = ema.state_dict()
    for name, parameter in net.named_parameters():
        assert torch.equal(state[f"ema.{name}"], parameter)
    assert ema.num_updates == 6
