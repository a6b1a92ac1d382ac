"""timm's ModelEmaV3 over our core: its behaviour, its numbers, its checkpoints, sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.integrations.timm import ModelEmaV3
from tests.helpers.layouts import rank, reference_step
from tests.helpers.pool import WorkerPool
from tests.integrations.facades import Training, file_of_timm, killed_and_resumed, shown

Worlds = dict[int, WorkerPool]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"decay": 0.9, "foreach": False},
    {"use_warmup": True},
    {"use_warmup": True, "warmup_power": 0.75, "update_after_step": 10, "min_decay": 0.3},
    {"decay": 0.97, "update_after_step": 20, "exclude_buffers": True},
]
pytestmark = pytest.mark.filterwarnings("ignore:the model has .* buffers with running statistics")


WHOLE = "timm as a whole needs torchvision: pip install timm torchvision"


@pytest.fixture(scope="module")
def their_class() -> Any:
    return file_of_timm()


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 8)
    )


def train(net: nn.Module, steps: range, *followers: Any, with_step: bool = True) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in steps:
        x = torch.randn(16, 8)
        (net(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for each in followers:
            each.update(net, step=step if with_step else None)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    mine, want = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.shows("timm", "one process")
@pytest.mark.parametrize("with_step", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_numbers_of_the_installed_package(
    settings: dict[str, Any], with_step: bool, their_class: Any
) -> None:
    """Over 200 steps, bit for bit, running statistics and counts included."""
    net = make_net()
    ours, theirs = ModelEmaV3(net, **settings), their_class(net, **settings)
    train(net, range(1, 201), ours, theirs, with_step=with_step)
    assert_same(ours, theirs)
    x = torch.randn(4, 8)
    assert net.training
    assert torch.equal(ours(x), theirs(x)), "in evaluation mode, whatever the model is in"
    assert net.training and not ours(x).requires_grad
    for step in (None, 1, 10, 500):
        assert ours.get_decay(step) == theirs.get_decay(step)


def test_set_starts_anew(their_class: Any) -> None:
    net = make_net()
    ours, theirs = ModelEmaV3(net, decay=0.9), their_class(net, decay=0.9)
    train(net, range(1, 6), ours, theirs)
    ours.set(net)
    theirs.set(net)
    assert all(map(torch.equal, ours.module.state_dict().values(), net.state_dict().values()))
    train(net, range(6, 9), ours, theirs)
    assert_same(ours, theirs)


def test_what_is_loaded_goes_on(their_class: Any) -> None:
    net = make_net()
    theirs = their_class(net, use_warmup=True)
    train(net, range(1, 51), theirs)
    ours, bare = ModelEmaV3(net, use_warmup=True), ModelEmaV3(net, use_warmup=True)
    ours.load_state_dict(theirs.state_dict())
    result = bare.module.load_state_dict(theirs.module.state_dict())  # as --resume does
    assert not result.missing_keys and not result.unexpected_keys
    train(net, range(51, 101), theirs, ours, bare)
    assert_same(ours, theirs)
    assert_same(bare, theirs)
    theirs.load_state_dict(ours.state_dict())
    state = ours.module.state_dict()
    del state["0.weight"]
    with pytest.raises(CheckpointMismatchError, match=r"0\.weight"):
        ours.module.load_state_dict(state)
    assert ours.module.load_state_dict({**state, "odd": 0}, strict=False) == (["0.weight"], ["odd"])


def test_parameters_and_buffers_are_the_average() -> None:
    """As timm's distribute_bn and validation find them: by name, and to be written to."""
    net = make_net()
    ema = ModelEmaV3(net, decay=0.9)
    train(net, range(1, 6), ema)
    state = ema.module.state_dict()
    for name, tensor in (*ema.module.named_parameters(), *ema.module.named_buffers()):
        assert torch.equal(tensor, state[name]), name
    assert len(list(ema.parameters())) == len(list(net.parameters()))
    dict(ema.named_buffers())["module.1.running_mean"].zero_()
    assert not ema.module.state_dict()["1.running_mean"].any()
    assert net[1].running_mean.any()


def test_another_model_is_refused() -> None:
    net = make_net()
    ema = ModelEmaV3(net)
    with pytest.raises(ConfigError, match="that is not the Sequential"):
        ema.update(make_net(), step=1)
    with pytest.raises(ConfigError, match="decay"):
        ModelEmaV3(net, decay=1.5)


def test_a_checkpoint_of_timm_has_it(tmp_path: Path) -> None:
    saver_of = pytest.importorskip("timm.utils", reason=WHOLE, exc_type=ImportError)
    net = make_net()
    ema = ModelEmaV3(net, decay=0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    train(net, range(1, 6), ema)
    saver = saver_of.CheckpointSaver(
        net, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)["state_dict_ema"]
    want = ema.module.state_dict()
    assert saved.keys() == net.state_dict().keys()
    assert all(torch.equal(saved[name], want[name]) for name in want)


# ---------------------------------------------------------------------- several ranks


def in_a_layout(mode: str) -> None:
    training = Training(mode)
    ema = ModelEmaV3(training.model, decay=0.6)
    average = training.trained()
    for step in range(1, 7):
        training.step(step)
        ema.update(training.model, step=step)
        reference_step(average, training.trained(), 1.0 - ema.get_decay(step))
    state = ema.module.state_dict()
    for name, value in average.items():
        assert torch.equal(state[name].float(), value.to(state[name].dtype).float()), name
    ema.ema.close()
    training.end()


@pytest.mark.parametrize("mode", shown("timm", "ddp", "fsdp1", "fsdp2"))
def test_sharded(mode: str, worlds: Worlds) -> None:
    worlds[2].run(in_a_layout, mode)


@pytest.mark.shows("timm", "ZeRO-2")
def test_under_deepspeed(engine_worlds: Worlds) -> None:
    engine_worlds[2].run(in_a_layout, "zero2")


def before_the_wrapper() -> None:
    """timm's order: of the bare model, updated with the wrapper, saved on rank 0 alone."""
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    ema = ModelEmaV3(bare, decay=0.9)
    model = nn.parallel.DistributedDataParallel(bare)
    average = {name: p.detach().clone() for name, p in bare.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(1, 5):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step=step)
        reference_step(average, dict(bare.named_parameters()), 1.0 - ema.get_decay(step))
    if rank() == 0:
        state = ema.module.state_dict()
        assert all(torch.equal(state[name], value) for name, value in average.items())
    dist.barrier()
    ema.ema.close()


def test_in_the_order_of_timm(worlds: Worlds) -> None:
    worlds[2].run(before_the_wrapper)


def test_the_example_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Killed on both ranks and started again, the epoch after the save gives the same average."""
    pytest.importorskip("timm.utils", reason=WHOLE, exc_type=ImportError)
    before, after = killed_and_resumed("timm_loop.py", tmp_path, "--epochs", "4", at_step=35)
    assert next(line for line in after if line.startswith("epoch")) == before[-1]
