"""Meshes of several axes: what is replicated over them is shared out, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.errors import BindError, EMAError, UnsupportedLayoutError
from sharded_ema.model.sources import replicas
from tests.helpers import support
from tests.helpers.layouts import as_float, assert_equal, build, rank, reference_step
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages
from tests.tools.test_consolidated import read

Worlds = dict[int, WorkerPool]


def error_of(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except EMAError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


class Held(nn.Module):
    """A module that holds given tensors as its parameters."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def on(mesh: DeviceMesh, placements: list[Placement], *shape: int) -> Tensor:
    """The numbers from 0 on as a DTensor."""
    full = torch.arange(float(torch.Size(shape).numel())).view(shape)
    return distribute_tensor(full, mesh, placements)


def gather_in_small_blocks() -> list[int]:
    """Over two axes, ranges that no block of the gather fits; bf16 beside fp32."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    everywhere = on(mesh, [Replicate(), Replicate()], 7, 5)
    model = Held(
        everywhere=everywhere,
        small=on(mesh, [Replicate(), Replicate()], 3, 3).bfloat16(),
        columns=on(mesh, [ShardPlacement(1), Replicate()], 5, 3, 2),
        rows=on(mesh["b"], [ShardPlacement(0)], 5, 3),
        plain=torch.arange(11.0),
        strided=torch.arange(6.0).view(2, 3).t(),
    )
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(8)
    ema.update()
    parts = [shard.numel for shard in ema._model.reader.shards]
    whole, replicas.GATHER_NUMEL = replicas.GATHER_NUMEL, 6
    try:
        with ema.swap():
            for name, parameter in model.named_parameters():
                full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                count = torch.arange(float(full.numel())) + 4
                wanted = count.view(2, 3).t() if name == "strided" else count.view(full.shape)
                assert torch.equal(full.float(), wanted.to(full.dtype).float()), name
        ema.copy_to()
        assert torch.equal(model.plain.detach(), torch.arange(11.0) + 4)
    finally:
        replicas.GATHER_NUMEL = whole
    ema.close()
    return parts


def test_swap_gathers_along_one_axis_after_another(worlds: Worlds) -> None:
    ranks = worlds[4].run(gather_in_small_blocks)
    # everywhere, small, columns, rows, plain, strided
    assert [sum(parts) for parts in zip(*ranks, strict=True)] == [35, 9, 30, 15, 11, 6]
    # The first two and the plain ones have four replicas each and are divided together.
    assert [p[0] + p[1] + p[4] + p[5] for p in ranks] == [16, 15, 15, 15]


def load_other_slices() -> None:
    """A state in memory of which this rank needs a part of a block."""
    given, taken = build("hsdp_whole"), build("hsdp", seed=3)
    source = ShardedEMA(given.target, 0.9, **given.options)
    source.attach(given.optimizer)
    for index in range(3):
        given.step(index)
    ema = ShardedEMA(taken.target, 0.9)
    assert not torch.equal(averages(ema)["inp.weight"], averages(source)["inp.weight"])
    ema.load_state_dict(source.state_dict())
    assert_equal(averages(ema), averages(source))
    for each in (source, ema):
        each.close()


def test_state_of_whole_blocks_loads_into_slices(worlds: Worlds) -> None:
    worlds[4].run(load_other_slices)


def move_in_memory(mode: str) -> None:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.5, **run.options)
    expected = as_float(run.gather())
    run.bare.double()
    for _ in range(2):
        with torch.no_grad():
            for parameter in run.bare.parameters():
                local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
                local.add_(1)
        ema.update()
        reference_step(expected, run.gather(), 0.5)
    assert_equal(averages(ema), expected)
    ema.close()


@pytest.mark.parametrize("mode", ["hsdp", "ddp", "tp_fsdp2"])
def test_slices_follow_parameters_that_move(worlds: Worlds, mode: str) -> None:
    worlds[4].run(move_in_memory, mode)


def attach_with_odd_value(mode: str, name: str) -> tuple[str, str]:
    run = build(mode)
    parameter = dict(run.bare.named_parameters())[name]
    with torch.no_grad():
        held = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
        if rank() == 1:
            held.view(-1)[:1] += 1e-3
    return error_of(lambda: ShardedEMA(run.target, 0.9).attach(run.optimizer))


@pytest.mark.parametrize(
    ("mode", "name"), [("fsdp2", "scalar"), ("tp", "one"), ("hsdp", "scalar"), ("tp_fsdp2", "one")]
)
def test_copies_that_nothing_keeps_equal_are_compared(worlds: Worlds, mode: str, name: str) -> None:
    """Plain parameters, and those sharded over the data-parallel axis alone."""
    for found, message in worlds[2 if mode in ("fsdp2", "tp") else 4].run(
        attach_with_odd_value, mode, name
    ):
        assert found == BindError.__name__
        assert f"parameter {name}" in message and "rank 0 and rank 1" in message


def refusals() -> list[tuple[str, str, str]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial(), Replicate()])
    kind = DTensor.from_local(TwoTensor(torch.ones(3), torch.ones(3)), mesh, [Replicate()] * 2)
    down = DeviceMesh("cpu", [[3, 2], [1, 0]])
    pair, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    pairs = DeviceMesh.from_group(pair, "cpu")
    row = init_device_mesh("cpu", (4,))
    sharded = on(row, [ShardPlacement(0)], 8)
    part = DTensor.from_local(torch.ones(3), pairs, [ShardPlacement(0)], run_check=False)
    hidden = nn.Sequential(nn.Linear(4, 8))
    parallelize_module(hidden, mesh["b"], {"0": ColwiseParallel()})
    models: dict[str, nn.Module] = {
        "hidden": DistributedDataParallel(hidden, device_mesh=mesh["a"]),
        "partial": Held(weight=partial),
        "subclass": Held(weight=kind),
        "descending": Held(weight=on(down, [ShardPlacement(0), Replicate()], 8)),
        "unrelated": Held(first=sharded, weight=part),
        "replicate": replicate(Held(weight=nn.Parameter(torch.ones(3)))),
    }
    return [(case, *error_of(lambda m=m: ShardedEMA(m, 0.9))) for case, m in models.items()]


def test_layouts_without_a_part_on_each_rank_are_refused_by_name(worlds: Worlds) -> None:
    for found in worlds[4].run(refusals):
        for case, name, message in found:
            assert name == UnsupportedLayoutError.__name__, case
            assert re.search(r"parameter (0\.)?weight|a DDPHeld", message), case
        messages = {case: message for case, _, message in found}
        assert "DistributedDataParallel" in messages["hidden"]
        assert "Partial" in messages["partial"]
        assert "TwoTensor" in messages["subclass"]
        assert "replicate_with_fsdp" in messages["replicate"]
        assert "ascend" in messages["descending"]
        assert "Make one mesh over all ranks and slice the others from it" in messages["unrelated"]


def sharing(layout: str, folder: str) -> tuple[int, int]:
    """Bytes of this rank's shadow, shared and whole."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    assert sum(p.numel() for p in model.parameters()) == support.SHARED_NUMEL
    axes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    target: nn.Module = model
    if layout == "DDP":
        target = DistributedDataParallel(model)
    elif layout == "HSDP, 2 x 2":
        fully_shard(model, mesh=axes)
    else:
        target = FullyShardedDataParallel(
            model,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
            device_mesh=axes,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    optimizer = torch.optim.AdamW(target.parameters(), lr=1e-2)
    shared = ShardedEMA(target, 0.9)
    whole = ShardedEMA(target, 0.9, shard_replicas=False)
    shared.attach(optimizer)
    for index in range(2):
        generator = torch.Generator().manual_seed(10 * index + rank())
        target(torch.randn(4, 1024, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        whole.update()
    shared.save(Path(folder, "shared"), step=2)
    whole.save(Path(folder, "whole"), step=2)
    sizes = shared.memory["shadow"], whole.memory["shadow"]
    shared.close()
    whole.close()
    return sizes


@pytest.mark.parametrize("layout", support.SHARES)
def test_replicas_share_the_same_average(worlds: Worlds, layout: str, tmp_path: Path) -> None:
    """The bytes are those in the README, and the shares put together are the whole."""
    assert worlds[4].run(sharing, layout, str(tmp_path)) == [support.SHARES[layout]] * 4
    for name in ("shared", "whole"):
        assert consolidate(tmp_path / name, tmp_path / f"{name}-out", progress=False).ok
    assert_equal(read(tmp_path / "shared-out")[0], read(tmp_path / "whole-out")[0])


class Normed(nn.Module):
    """Batch statistics are of the data that this rank sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def statistics(layout: str, buffers: str, path: str) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Normed()
    if layout == "ddp":
        target: nn.Module = DistributedDataParallel(model, broadcast_buffers=False)
    else:
        target = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(target, 0.9, buffers=buffers)
    ema.attach(optimizer)
    norm = model.norm
    average = {n: getattr(norm, n).clone() for n in ("running_mean", "running_var")}
    for index in range(3):
        generator = torch.Generator().manual_seed(10 * index + rank())
        target(torch.randn(8, 4, generator=generator) + rank()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in average.items():
            value.lerp_(getattr(norm, name), 1 - 0.9)
    names = [*average, "num_batches_tracked"]
    before = {n: getattr(norm, n).clone() for n in names}
    with ema.swap():
        inside = {n: getattr(norm, n).clone() for n in names}
    after = {n: getattr(norm, n).clone() for n in names}
    ema.save(path, step=3)
    ema.load(path)
    loaded = {n: getattr(norm, n).clone() for n in names}
    with ema.swap():
        again = {n: getattr(norm, n).clone() for n in names}
    ema.close()
    found = {"before": before, "average": average, "inside": inside, "after": after}
    return {**found, "loaded": loaded, "again": again}


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_batch_statistics_that_differ_between_ranks(
    worlds: Worlds, layout: str, buffers: str, tmp_path: Path
) -> None:
    first, second = worlds[2].run(statistics, layout, buffers, str(tmp_path / "ema"))
    names = ("running_mean", "running_var")
    assert all(not torch.equal(first["before"][n], second["before"][n]) for n in names)
    for own in (first, second):
        # Each rank averages its own and gets its own back; a load leaves the model alone.
        want = own["before"] | own["average"] if buffers == "average" else own["before"]
        assert_equal(own["inside"], want)
        assert_equal(own["after"], own["before"])
        assert_equal(own["loaded"], own["before"])
    # One copy goes to disk, the first rank's, and that is what everybody loads.
    saved = first["before"] | first["average"] if buffers == "average" else first["before"]
    assert consolidate(tmp_path / "ema", tmp_path / "out", progress=False).ok
    exported, _ = read(tmp_path / "out")
    assert_equal({n: exported[f"norm.{n}"] for n in saved}, saved)
    assert exported["norm.num_batches_tracked"].dtype == torch.int64
    if buffers == "average":
        for own in (first, second):
            assert_equal({n: own["again"][n] for n in names}, first["average"])
    else:
        assert_equal(second["again"], second["before"])
