"""The average as a live module: what it computes, what it takes, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import ShardedEMA
from tests.helpers.layouts import rank, world
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]
STEPS = 20


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Uneven and empty shards on two, three and four ranks; a tied and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(3, 5)
        self.layers = nn.ModuleList([Layer(5, 7), Layer(5, 1)])
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.out = nn.Linear(5, 3, bias=False)
        self.tied = nn.Linear(5, 3, bias=False)
        self.tied.weight = self.out.weight
        self.register_buffer("scale", torch.ones(()))
        self.aside = [self.inp]  # an attribute that leads to a module

    def forward(self, x: Tensor) -> Tensor:
        h = self.aside[0](x)
        for layer in self.layers:
            h = layer(h)
        return (self.out(h) + self.tied(self.frozen(h))) * self.scale


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def computed(average: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a plain module with these weights computes."""
    plain = Net()
    plain.load_state_dict(average, strict=False)
    with torch.no_grad():
        return plain(x)


def data(index: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(index + 100 * rank()))


def wrap(layout: str) -> tuple[nn.Module, dict[str, Any]]:
    net: nn.Module = Net()
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (world(),))
        for layer in net.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh), {}
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in net.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh), {"shard_replicas": False}
    if layout == "ddp":
        return DistributedDataParallel(net), {"shard_replicas": False}
    return net, {}


def gather(model: nn.Module) -> dict[str, Tensor]:
    if hasattr(model, "reshard"):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
    return {
        name.removeprefix("module."): whole(p)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def beside_the_student(layout: str, order: str) -> dict[str, int]:
    model, options = wrap(layout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ema = ShardedEMA(model, 0.9, **options)
    ema.attach(optimizer)
    before = ema.memory
    teacher = ema.module()
    assert ema.module() is teacher
    assert ema.memory["ideal"] == before["ideal"]
    average = gather(model)
    for index in range(STEPS):
        for part in range(2):
            x = data(2 * index + part)
            with torch.no_grad():
                if order == "teacher first":
                    wanted = teacher(x)
            found = model(x)
            if order == "student first":
                with torch.no_grad():
                    wanted = teacher(x)
            assert torch.equal(wanted, computed(average, x)), (index, part)
            (found - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, now in gather(model).items():
            average[name].lerp_(now, 1 - 0.9)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(data(0)), computed(average, data(0)))
    assert any(not torch.equal(average[n], p) for n, p in gather(model).items())
    full = ema.full_state_dict(rank0_only=False)
    assert all(torch.equal(full[n], average[n]) for n in ema.names)
    used = ema.memory
    ema.close()
    return {"shadow": used["shadow"], "ideal": used["ideal"]}


ORDERS = ["teacher first", "student first"]


@pytest.mark.parametrize("order", ORDERS)
def test_in_one_process(order: str) -> None:
    used = beside_the_student("plain", order)
    assert used["shadow"] == used["ideal"]


@pytest.mark.parametrize(
    ("layout", "size", "order"),
    [
        ("ddp", 2, "student first"),
        ("fsdp2", 2, "student first"),
        ("fsdp2", 3, "teacher first"),
        ("fsdp2", 4, "student first"),
        ("hsdp", 4, "teacher first"),
    ],
)
def test_beside_the_student(worlds: Worlds, layout: str, size: int, order: str) -> None:
    for used in worlds[size].run(beside_the_student, layout, order):
        # Uneven shards are padded by fully_shard: at most one row for each.
        assert used["ideal"] <= used["shadow"] <= used["ideal"] + 4 * 60
