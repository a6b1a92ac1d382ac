"""Parameters that FSDP keeps in host memory, and process groups that do not reach there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from sharded_ema import ShardedEMA
from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.sources.replicas import Replicas
from tests.helpers.layouts import (
    Block,
    Ragged,
    Run,
    as_float,
    assert_equal,
    rank,
    reference_step,
    world,
)
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]


def build_offloaded(kind: str) -> Run:
    torch.manual_seed(0)
    bare = Ragged()
    target: torch.nn.Module = bare
    if kind == "fsdp2":
        ignored = [bare.transposed, bare.conv.weight, bare.scalar]
        mesh = init_device_mesh("cpu", (world(),))
        policy = CPUOffloadPolicy(pin_memory=False)
        for block in bare.blocks:
            fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(bare, mesh=mesh, offload_policy=policy, ignored_params=set(ignored))
    else:
        ignored = [bare.scalar] + [bare.frozen] * (kind == "fsdp1_flat")
        target = FSDP(
            bare,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            ignored_states=ignored,
            device_id=torch.device("cpu"),
            use_orig_params=kind == "fsdp1",
            cpu_offload=CPUOffload(offload_params=True),
        )
    trainable = [p for p in bare.parameters() if p.requires_grad]
    return Run(target, bare, torch.optim.AdamW(trainable, lr=1e-2), ignored, rank(), {})


def average_and_swap(kind: str, path: Path) -> None:
    run = build_offloaded(kind)
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    expected = as_float(run.gather())
    for index in range(6):
        run.step(index)
        reference_step(expected, run.gather(), 1 - 0.9)
        before, out = run.gather(), run.evaluate()
        with ema.swap():
            assert_equal(run.gather(), expected)
            assert not torch.equal(run.evaluate(), out)
        assert_equal(run.gather(), before)
        assert torch.equal(run.evaluate(), out)
    assert_equal(averages(ema), expected)
    assert ema.memory["host"] == ema.memory["shadow"] > 0
    ema.save(path, step=6)
    ema.reseed()
    ema.load(path, verify=True)
    assert_equal(averages(ema), expected)
    ema.close()


def without_accelerator(kind: str, path: Path) -> None:
    """FSDP1 pins what it offloads and waits for the accelerator; neither is at hand here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "pin_memory", Tensor.clone)
        patch.setattr(torch.cpu.Stream, "synchronize", lambda stream: None, raising=False)
        average_and_swap(kind, path)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "fsdp1_flat"])
def test_average_swap_save_and_load(worlds: Worlds, kind: str, tmp_path: Path) -> None:
    worlds[2].run(without_accelerator, kind, tmp_path / "x")


def gather_where_the_group_is_not() -> str:
    group = dist.new_group(backend="cuda:gloo")
    assert Replicas((), [torch.ones(3)]).size == 1
    with pytest.raises(UnsupportedLayoutError) as caught:
        Replicas((group,), [torch.ones(3)])
    return str(caught.value)


def test_replicas_in_host_memory_need_a_group_that_reaches_there(worlds: Worlds) -> None:
    for message in worlds[2].run(gather_where_the_group_is_not):
        assert "replicas on cpu" in message and '"cpu:gloo,cuda:nccl"' in message
