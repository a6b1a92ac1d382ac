"""Averages that other libraries have kept are taken over, and go on from there."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.errors import CheckpointCorruptError, CheckpointMismatchError, ConfigError
from tests.helpers.layouts import as_float, assert_equal, build, rank, reference_step
from tests.helpers.pool import WorkerPool


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3, bias=False)
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(self.body(x)))


def other_average(net: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in net.state_dict().items()}


def test_state_dict_of_safetensors(tmp_path: Path) -> None:
    net = Net()
    state = other_average(net)
    del state["tied.weight"]
    save_file(state, tmp_path / "model.safetensors")
    before = [p.detach().clone() for p in net.parameters()]
    for path in (tmp_path, tmp_path / "model.safetensors"):
        ema = ShardedEMA(net, {"a": 0.9, "b": "warmup:0.999"}, start_step=3, update_every=2)
        assert ema.load(path, num_updates=100) == 100
        assert ema.num_updates == 100
        for profile in ("a", "b"):
            full = ema.full_state_dict(profile)
            assert_equal({n: full[n] for n in ema.names}, {n: state[n] for n in ema.names})
            assert torch.equal(full["frozen.weight"], net.frozen.weight)
        shares = [math.prod([0.9] * 100), math.prod((1 + n) / (10 + n) for n in range(1, 101))]
        for share, profile in zip(shares, "ab", strict=True):
            assert ema.metrics()[f"ema/seed_weight/{profile}"] == pytest.approx(share)
        assert all(map(torch.equal, net.parameters(), before))


def test_it_goes_on_from_there(tmp_path: Path) -> None:
    net = Net()
    state = other_average(net)
    torch.save(state, tmp_path / "average.pt")
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    ema = ShardedEMA(net, "warmup:0.999")
    ema.load(tmp_path / "average.pt", num_updates=50)
    ema.attach(optimizer)
    for n in range(51, 61):
        net(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        for name in ema.names:
            decay = min(0.999, (1 + n) / (10 + n))
            state[name].lerp_(net.get_parameter(name).detach(), 1 - decay)
    full = ema.full_state_dict()
    assert_equal({n: full[n] for n in ema.names}, {n: state[n] for n in ema.names})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_files_of_torch_save(tmp_path: Path, prefix: str) -> None:
    net = Net()
    state = other_average(net)
    state["body.weight"] = state["body.weight"].t().contiguous().t()
    shared = torch.randn(100)
    state["body.bias"] = shared[7:11]  # a view into a larger storage
    named = OrderedDict((prefix + name, nn.Parameter(value)) for name, value in state.items())
    torch.save(named, tmp_path / "average.pth")
    ema = ShardedEMA(net, 0.9)
    ema.load(tmp_path / "average.pth", num_updates=7)
    full = ema.full_state_dict()
    assert all(torch.equal(full[name], state[name]) for name in ema.names)


def states_of_libraries(net: nn.Module) -> dict[str, tuple[Any, int | None]]:
    trained = [p.detach() + 1 for p in net.parameters() if p.requires_grad]
    every = [p.detach() + 1 for p in net.parameters()]
    averaged = AveragedModel(net)
    for _ in range(3):
        averaged.update_parameters(net)
    for p in averaged.parameters():
        p.data += 1
    added = {name: p.detach() + 1 for name, p in net.named_parameters()}
    return {
        "torch_ema": (
            {"decay": 0.9, "num_updates": 12, "shadow_params": trained, "collected_params": None},
            12,
        ),
        "diffusers": (
            {"decay": 0.9, "inv_gamma": 1.0, "optimization_step": 9, "shadow_params": every},
            9,
        ),
        "AveragedModel": (averaged.state_dict(), 3),
        "timm": ({"epoch": 3, "arch": "net", "state_dict": {}, "state_dict_ema": added}, None),
    }


@pytest.mark.parametrize("library", ["torch_ema", "diffusers", "AveragedModel", "timm"])
def test_states_of_libraries(tmp_path: Path, library: str) -> None:
    net = Net()
    state, count = states_of_libraries(net)[library]
    torch.save(state, tmp_path / "ema.pt")
    ema = ShardedEMA(net, 0.9)
    if count is None:
        with pytest.raises(ConfigError, match="pass num_updates"):
            ema.load(tmp_path / "ema.pt")
        count = 5
        ema.load(tmp_path / "ema.pt", num_updates=count)
    else:
        assert ema.load(tmp_path / "ema.pt") == count
    assert ema.num_updates == count
    full = ema.full_state_dict()
    for name in ema.names:
        assert torch.equal(full[name], net.get_parameter(name) + 1)


def test_an_export_says_itself_how_old_it_is(tmp_path: Path) -> None:
    net = Net()
    ema = ShardedEMA(net, 0.9)
    for _ in range(4):
        ema.update()
    ema.save(tmp_path / "step_4", step=4)
    consolidate(tmp_path / "step_4", tmp_path / "export", progress=False)
    again = ShardedEMA(net, 0.9)
    assert again.load(tmp_path / "export") == 4
    assert again.num_updates == 4
    with pytest.raises(ConfigError, match="leave num_updates out"):
        again.load(tmp_path / "step_4", num_updates=4)
    assert again.load(tmp_path / "step_4") == 4


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (open, ("executed",))


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "executed").touch()
    torch.save({"body.weight": torch.zeros(4, 3), "x": Malicious()}, "bad.pt")
    with pytest.raises(CheckpointCorruptError, match="names the forbidden global"):
        ShardedEMA(Net(), 0.9).load("bad.pt", num_updates=1)


def test_what_is_no_average_is_refused(tmp_path: Path) -> None:
    net = Net()
    good = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    bad: dict[str, tuple[Any, str]] = {
        "a list": ([torch.zeros(3)], "holds a list"),
        "a training state": ({"model": good, "epoch": 3}, r"a dict with \['model', 'epoch'\]"),
        "other shapes": ({**good, "body.bias": torch.zeros(5)}, r"body\.bias is \(5,\) there"),
        "other names": ({"x": torch.zeros(3)}, r"it lacks \['body\.weight'.*unknown \['x'\]"),
        "more names": ({**good, "x": torch.zeros(3)}, r"unknown \['x'\]"),
        "fewer": ({"body.weight": good["body.weight"]}, r"it lacks \['body\.bias'"),
        "too few in order": ({"shadow_params": [torch.zeros(3)]}, "it lists 1 parameters"),
        "no tensors": ({"shadow_params": ["x"]}, "no list of tensors"),
    }
    ema = ShardedEMA(net, 0.9)
    before = ema.full_state_dict()
    for name, (value, said) in bad.items():
        torch.save(value, tmp_path / "bad.pt")
        with pytest.raises(CheckpointMismatchError, match=said):
            ema.load(tmp_path / "bad.pt", num_updates=1)
        assert_equal(ema.full_state_dict(), before)
        assert ema.num_updates == 0, name
    torch.save({**good, "x": torch.zeros(3)}, tmp_path / "more.pt")
    ema.load(tmp_path / "more.pt", num_updates=1, strict=False)
    assert not ema.full_state_dict()["body.weight"].any()


def test_damage_is_found(tmp_path: Path) -> None:
    net = Net()
    path = tmp_path / "average.pt"
    torch.save({name: torch.ones_like(value) for name, value in net.state_dict().items()}, path)
    data = bytearray(path.read_bytes())
    at = data.index(torch.ones(12).numpy().tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    ema = ShardedEMA(net, 0.9)
    with pytest.raises(CheckpointCorruptError, match="CRC32 mismatch"):
        ema.load(path, num_updates=1)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointCorruptError, match="no archive ends with it"):
        ema.load(path, num_updates=1)


def take_over(mode: str, path: str) -> None:
    run = build(mode)
    expected = as_float(run.gather())
    if rank() == 0:
        state = {name: (value + 1).contiguous() for name, value in expected.items()}
        save_file(state, f"{path}/model.safetensors")
    torch.distributed.barrier()
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    ema.load(path, num_updates=20)
    expected = {name: value + 1 for name, value in expected.items()}
    for index in range(3):
        run.step(index)
        reference_step(expected, run.gather(), 1 - 0.9)
    full = ema.full_state_dict(rank0_only=False)
    assert_equal({name: full[name] for name in expected}, expected)
    assert ema.num_updates == 23
    ema.close()


@pytest.mark.parametrize("mode", ["fsdp2", "fsdp1_flat", "tp_fsdp2"])
def test_into_any_layout(worlds: dict[int, WorkerPool], tmp_path: Path, mode: str) -> None:
    worlds[4 if mode == "tp_fsdp2" else 3].run(take_over, mode, str(tmp_path))
