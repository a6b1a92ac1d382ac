"""torch_ema's ExponentialMovingAverage over our core: its behaviour, its numbers, sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sharded_ema.errors import ConfigError
from sharded_ema.integrations.torch_ema import ExponentialMovingAverage
from tests.helpers.layouts import assert_equal, reference_step
from tests.helpers.pool import WorkerPool
from tests.integrations.facades import Training, assert_list, shown

Worlds = dict[int, WorkerPool]
SETTINGS: list[dict[str, Any]] = [
    {"decay": 0.9999},
    {"decay": 0.95},
    {"decay": 0.97, "use_num_updates": False},
]


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def changed(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.shows("torch_ema", "one process")
@pytest.mark.parametrize("settings", SETTINGS)
def test_numbers_of_the_installed_package(settings: dict[str, Any]) -> None:
    """Over 200 steps. torch_ema rounds an update twice and we once, which moves the last place."""
    torch_ema = pytest.importorskip("torch_ema", reason="pip install torch_ema")
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    theirs = torch_ema.ExponentialMovingAverage(net.parameters(), **settings)
    ours = ExponentialMovingAverage(net.parameters(), **settings)
    for _ in range(200):
        x = torch.randn(16, 8)
        (net(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.update()
        ours.update()
    assert ours.num_updates == theirs.num_updates
    pairs = zip(ours.shadow_params, theirs.shadow_params, strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 2.4e-7


@pytest.mark.parametrize("explicit", [False, True])
def test_store_and_restore(explicit: bool) -> None:
    net = make_net()
    given = net.parameters if explicit else lambda: None
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    with pytest.raises(RuntimeError, match="store"):
        ema.restore(given())
    weights = [p.detach().clone() for p in net.parameters()]
    ema.store(given())
    changed(net)
    ema.restore(given())
    assert all(map(torch.equal, net.parameters(), weights))
    changed(net)
    ema.restore(given())  # as often as one likes
    assert all(map(torch.equal, net.parameters(), weights))


@pytest.mark.parametrize("explicit", [False, True])
def test_update_and_copy_to(explicit: bool) -> None:
    net = make_net()
    given = net.parameters if explicit else lambda: None
    ema = ExponentialMovingAverage(net.parameters(), 0.5, use_num_updates=False)
    weights = [p.detach().clone() for p in net.parameters()]
    changed(net)
    half = [(w + p.detach()) / 2 for w, p in zip(weights, net.parameters(), strict=True)]
    ema.update(given())
    ema.copy_to(given())
    for parameter, value in zip(net.parameters(), half, strict=True):
        assert torch.allclose(parameter, value, atol=1e-6)


def test_the_block_gives_back_the_weights() -> None:
    net, other = make_net(), make_net()
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    changed(net)
    ema.update()
    weights = [p.detach().clone() for p in net.parameters()]
    for module, given in ((net, None), (net, net.parameters()), (other, other.parameters())):
        before = [p.detach().clone() for p in module.parameters()]
        with pytest.raises(KeyError), ema.average_parameters(given):
            assert all(map(torch.equal, module.parameters(), ema.shadow_params))
            raise KeyError
        assert all(map(torch.equal, module.parameters(), before))
    assert all(map(torch.equal, net.parameters(), weights))


def test_from_the_parameters_of_another_model() -> None:
    net, other = make_net(), make_net()
    ema = ExponentialMovingAverage(net.parameters(), 0.0, use_num_updates=False)
    weights = [p.detach().clone() for p in net.parameters()]
    changed(other)
    ema.update(other.parameters())
    assert all(map(torch.equal, ema.shadow_params, other.parameters()))
    assert all(map(torch.equal, net.parameters(), weights))
    with pytest.raises(ConfigError, match="2 parameters were given"):
        ema.update(net[0].parameters())


def test_the_decay_may_change() -> None:
    net = make_net()
    ema = ExponentialMovingAverage(net.parameters(), 0.9, use_num_updates=False)
    ema.decay = 0.0
    changed(net)
    ema.update()
    assert all(map(torch.equal, ema.shadow_params, net.parameters()))


def test_state_goes_back_and_forth_with_torch_ema() -> None:
    torch_ema = pytest.importorskip("torch_ema", reason="pip install torch_ema")
    net = make_net()
    theirs = torch_ema.ExponentialMovingAverage(net.parameters(), 0.97)
    for _ in range(50):
        changed(net)
        theirs.update()
    theirs.store()
    ours = ExponentialMovingAverage(net.parameters(), 0.5)
    ours.load_state_dict(theirs.state_dict())
    assert (ours.decay, ours.num_updates, ours.ema.num_updates) == (0.97, 50, 50)
    assert torch.equal(ours.collected_params[0], net[0].weight)
    for _ in range(20):
        changed(net)
        theirs.update()
        ours.update()
    pairs = list(zip(ours.shadow_params, theirs.shadow_params, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)
    theirs.load_state_dict(ours.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(ours.shadow_params, theirs.shadow_params, strict=True)
    )
    assert theirs.num_updates == 70


def test_the_share_of_the_seed_is_loaded() -> None:
    net = make_net()
    ema = ExponentialMovingAverage(net.parameters(), 0.5, use_num_updates=False)
    state = ExponentialMovingAverage(net.parameters(), 0.97).state_dict() | {"num_updates": 3}
    ema.load_state_dict(state)
    share = 2 / 11 * 3 / 12 * 4 / 13
    assert ema.ema.metrics()["ema/seed_weight/ema"] == pytest.approx(share)


def test_settings_that_are_none() -> None:
    net = make_net()
    for decay in (-0.1, 1.1):
        with pytest.raises(ValueError, match="decay"):
            ExponentialMovingAverage(net.parameters(), decay)
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    state = ema.state_dict()
    for name, wrong in (
        ("decay", 2.0),
        ("num_updates", "many"),
        ("shadow_params", [1]),
        ("shadow_params", state["shadow_params"][:2]),
    ):
        with pytest.raises(ConfigError):
            ema.load_state_dict({**state, name: wrong})
    assert ema.num_updates == 0


def test_in_another_dtype_and_on_the_host() -> None:
    net = make_net()
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    before = [value.clone() for value in ema.shadow_params]
    ema.to(device="cpu", dtype=torch.float64)
    assert all(value.dtype == torch.float64 for value in ema.shadow_params)
    assert all(torch.equal(a, b.float()) for a, b in zip(before, ema.shadow_params, strict=True))


def in_a_layout(mode: str) -> None:
    training = Training(mode)
    names = [name for name, _ in training.bare.named_parameters()]
    ema = ExponentialMovingAverage(training.model.parameters(), 0.6)
    average = training.trained()
    for n in range(1, 7):
        training.step(n)
        ema.update()
        reference_step(average, training.trained(), 1.0 - min(0.6, (1 + n) / (10 + n)))
    found = dict(zip(ema._keeper.names, ema.shadow_params, strict=True))
    assert_list([found[name] for name in names], average, names)
    before = training.weights()
    with ema.average_parameters():
        for name, now in training.weights().items():
            assert torch.equal(now, average[name].to(now.dtype)), name
    ema.store()
    ema.copy_to()
    ema.restore()
    assert_equal(training.weights(), before)
    ema.ema.close()
    training.end()


@pytest.mark.parametrize("mode", shown("torch_ema", "ddp", "fsdp1", "fsdp2"))
def test_sharded(mode: str, worlds: Worlds) -> None:
    worlds[2].run(in_a_layout, mode)


@pytest.mark.shows("torch_ema", "ZeRO-3")
def test_under_deepspeed(engine_worlds: Worlds) -> None:
    engine_worlds[2].run(in_a_layout, "zero3")
