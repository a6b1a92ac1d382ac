"""Parameters that FSDP keeps in host memory, and process groups that do not reach there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from sharded_ema import ShardedEMA
from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.sources.replicas import Replicas
from tests.helpers import engines
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


# ---------------------------------------------------------------------- copies that are under way

ELSEWHERE = torch.device("xpu", 0)


@contextmanager
def computing_elsewhere(target: Any) -> Iterator[None]:
    """What the frameworks say where they compute, for as long as an average is made."""
    if hasattr(target, "zero_optimization_stage"):
        owners: list[Any] = [target]
    else:
        modules = list(target.modules())
        owners = [m._handle for m in modules if isinstance(m, FSDP)]
        states = [m._get_fsdp_state() for m in modules if isinstance(m, FSDPModule)]
        owners += [state._fsdp_param_group for state in states]
    with pytest.MonkeyPatch.context() as patch:
        for owner in owners:
            patch.setattr(owner, "device", ELSEWHERE)
        yield


def watch_copies(ema: ShardedEMA, read: Callable[[], list[Tensor]]) -> None:
    """The device reads weights until it is waited for, so that it must be before they change."""
    seen: list[list[Tensor]] = []
    device = SimpleNamespace(synchronize=lambda asked: seen.append(read()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharded_ema.model.devices._module", lambda asked: device)
        raw = read()
        with ema.swap():
            average = read()
            assert_lists_equal(seen, [raw, average])
        assert_lists_equal(seen, [raw, average, average, raw])
        seen.clear()
        ema.copy_to()
        assert_lists_equal(seen, [raw, average])


def assert_lists_equal(got: list[list[Tensor]], want: list[list[Tensor]]) -> None:
    assert len(got) == len(want)
    for left, right in zip(got, want, strict=True):
        assert all(map(torch.equal, left, right))
    assert any(not torch.equal(*pair) for pair in zip(want[0], want[1], strict=True))


def copies_of_shards(kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "pin_memory", Tensor.clone)
        patch.setattr(torch.cpu.Stream, "synchronize", lambda stream: None, raising=False)
        run = build_offloaded(kind)
        run.step(0)  # after which FSDP1 has its shards for good
        with computing_elsewhere(run.target):
            ema = ShardedEMA(run.target, 0.9)
        run.step(1)
        ema.update()
        run.gather()  # resharded
        shards = [
            p._local_tensor if hasattr(p, "_local_tensor") else p for p in run.bare.parameters()
        ]
        if kind != "fsdp2":
            shards = [m._handle.flat_param._local_shard for m in FSDP.fsdp_modules(run.target)]
        watch_copies(ema, lambda: [t.detach().clone() for t in shards])
        ema.close()


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "fsdp1_flat"])
def test_copies_under_way_end_before_host_memory_changes(worlds: Worlds, kind: str) -> None:
    worlds[2].run(copies_of_shards, kind)


def copies_of_an_engine(stage: int) -> None:
    offload = {"device": "cpu"}
    zero = {"offload_optimizer": offload} | ({"offload_param": offload} if stage == 3 else {})
    run = engines.build(stage, "bf16", zero=zero, zero_force_ds_cpu_optimizer=False)
    with computing_elsewhere(run.engine):
        ema = ShardedEMA(run.engine, 0.5)
    ema.attach()
    run.step(0)

    def read() -> list[Tensor]:
        return [getattr(p, "ds_tensor", p).detach().clone() for p in run.module.parameters()]

    watch_copies(ema, read)
    ema.close()
    run.engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_copies_of_an_engine_end_before_host_memory_changes(
    engine_worlds: Worlds, stage: int
) -> None:
    engine_worlds[2].run(copies_of_an_engine, stage)
