"""The average is made too early: before the model is sharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_ema import ShardedEMA
from sharded_ema.errors import BindError
from tests.helpers.pool import WorkerPool

pytestmark = pytest.mark.dist

Worlds = dict[int, WorkerPool]


def too_early(attach_before: bool) -> str:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    ema = ShardedEMA(model, 0.9)
    if attach_before:
        ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(BindError) as caught:
        if not attach_before:
            ema.attach(optimizer)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        ema.metrics()
    return str(caught.value)


@pytest.mark.parametrize("attach_before", [False, True])
def test_the_average_and_not_the_optimizer_is_to_blame(worlds: Worlds, attach_before: bool) -> None:
    for said in worlds[2].run(too_early, attach_before):
        assert "make the ShardedEMA after wrapping" in said and "optimizer" not in said
