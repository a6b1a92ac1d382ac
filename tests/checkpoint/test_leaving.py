"""How an average leaves the library by other ways than its own: torch.save, copies, others' DCP."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_ema import ShardedEMA
from sharded_ema.errors import EMAWarning, StateError, SwapError
from tests.helpers.layouts import (
    as_float,
    assert_equal,
    build,
    rank,
    reference_step,
)
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]
# What a single rank can be wrapped in.
ALONE = ("plain", "ddp", "fsdp2", "fsdp2_mixed", "replicate", "fsdp1", "fsdp1_flat")


# ---------------------------------------------------------------------- in one process


class Odd(nn.Module):
    """A tied, a frozen, a transposed and a 0-d parameter, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.head.weight
        self.turned = nn.Parameter(torch.randn(5, 3).t())
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.arange(4.0), requires_grad=False)
        self.register_buffer("nothing", torch.empty(0, 3))


def through_a_file(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    torch.save(state, path)
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_state_is_plain_tensors(tmp_path: Path, buffers: str) -> None:
    model = Odd()
    ema = ShardedEMA(model, {"a": 0.5, "b": 0.9}, buffers=buffers)
    expected = values(model)
    moved(model)
    ema.update()
    reference_step(expected, values(model), 0.5)
    state = ema.state_dict()
    assert {type(value) for value in state.values()} == {Tensor}
    loaded = through_a_file(state, tmp_path / "state.pt")
    fresh = ShardedEMA(Odd(), {"a": 0.5, "b": 0.9}, buffers=buffers)
    fresh.load_state_dict(loaded)
    assert fresh.num_updates == 1
    for name, value in expected.items():
        assert torch.equal(fresh.state_dict()[f"a.{name}"], value)
    assert torch.equal(loaded["_frozen.frozen"], torch.arange(4.0) + 1)
    where = "a" if buffers == "average" else "_buffers"
    assert loaded[f"{where}.nothing"].shape == (0, 3)


def test_a_load_into_a_state_in_place_leaves_the_model_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = Odd(), Odd()
    first.norm.running_mean.add_(7)
    first.frozen.add_(7)
    dcp.save({"ema": ShardedEMA(first, 0.5)}, checkpoint_id=tmp_path / "x", no_dist=True)
    before = {name: value.clone() for name, value in second.state_dict().items()}
    ema = ShardedEMA(second, 0.5)
    dcp.load({"ema": ema}, checkpoint_id=tmp_path / "x", no_dist=True)
    assert_equal(second.state_dict(), before)
    assert torch.equal(ema.state_dict()["ema.head.weight"], first.head.weight)


def plain_although_wrapped(mode: str, folder: str) -> None:
    run, fresh = build(mode), build(mode, seed=1)
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    expected = as_float(run.gather())
    for index in range(2):
        run.step(index)
        reference_step(expected, run.gather(), 1 - 0.9)
    state = ema.state_dict()
    assert {type(value) for value in state.values()} == {Tensor}
    loaded = through_a_file(state, Path(folder, "state.pt"))
    again = ShardedEMA(fresh.target, 0.9)
    again.load_state_dict(loaded)
    assert_equal({n: again.state_dict()[f"ema.{n}"].clone() for n in again.names}, expected)
    dcp.save({"ema": ema}, checkpoint_id=f"{folder}/dcp")
    third = ShardedEMA(build(mode, seed=2).target, 0.9)
    dcp.load({"ema": third}, checkpoint_id=f"{folder}/dcp")
    assert_equal({n: third.state_dict()[f"ema.{n}"].clone() for n in third.names}, expected)
    for each in (ema, again, third):
        each.close()


@pytest.mark.parametrize("mode", ALONE)
def test_a_state_of_a_single_rank_is_plain(worlds: Worlds, mode: str, tmp_path: Path) -> None:
    worlds[1].run(plain_although_wrapped, mode, str(tmp_path))


def plain_although_an_engine(stage: int, folder: str) -> None:
    from tests.helpers import engines

    run = engines.build(stage, "bf16")
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    expected = as_float(run.masters())
    run.step(0)
    reference_step(expected, run.masters(), 1 - 0.9)
    loaded = through_a_file(ema.state_dict(), Path(folder, "state.pt"))
    assert {type(value) for value in loaded.values()} == {Tensor}
    again = ShardedEMA(engines.build(stage, "bf16", seed=1).engine, 0.9)
    again.load_state_dict(loaded)
    assert_equal({n: again.state_dict()[f"ema.{n}"].clone() for n in again.names}, expected)
    for each in (ema, again):
        each.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_of_a_single_engine_is_plain(
    engine_worlds: Worlds, stage: int, tmp_path: Path
) -> None:
    engine_worlds[1].run(plain_although_an_engine, stage, str(tmp_path))


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("way", ["copy", "pickle"])
@pytest.mark.parametrize("numel", [100, 1 << 19, (1 << 20) + 1])
@pytest.mark.parametrize(
    "settings",
    [{}, {"nonfinite": "allow"}, {"impl": "reference"}, {"schedule": {"a": 0.5, "b": 0.9}}],
    ids=["guarded", "allow", "reference", "profiles"],
)
def test_a_copy_follows_the_copied_model(
    settings: dict[str, Any], numel: int, way: str, together: bool
) -> None:
    """Above a block of the update, which is a view of a parameter, too."""
    model = nn.Linear(numel, 1, bias=False)
    half = nn.Linear(3, 3).bfloat16()  # goes through the stage buffer
    both = nn.ModuleList([model, half])
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    ema = ShardedEMA(both, **{"schedule": 0.5, **settings})
    profile = next(iter(ema.decay))
    ema.attach(optimizer)
    expected = as_float(values(both))

    def train(module: nn.ModuleList, by: torch.optim.Optimizer) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        by.step()
        reference_step(expected, values(module), 0.5)

    def duplicate(thing: Any) -> Any:
        return copy.deepcopy(thing) if way == "copy" else pickle.loads(pickle.dumps(thing))

    train(both, optimizer)
    if together:
        copied, again = duplicate((both, ema))
    else:
        again = duplicate(ema)
        (copied,) = {id(m): m for m in [again._model.inventory.model]}.values()
    train(copied, torch.optim.SGD(copied.parameters(), lr=0.1))
    again.update()
    assert again.num_updates == 2 and ema.num_updates == 1
    with again.swap(profile):
        found = values(copied)
    assert_equal(found, {name: expected[name].to(found[name].dtype) for name in found})


def test_a_copy_keeps_what_was_counted_and_sees_other_weights() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.5)
    copied, again = copy.deepcopy((model, ema))
    with torch.no_grad():
        copied.weight.fill_(3.0)
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    with pytest.warns(EMAWarning, match="weights have changed since"):
        again.attach(optimizer)  # takes the weights in, as the first one would
    assert torch.equal(again.state_dict()["ema.weight"], copied.weight)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    ema.update()
    skipped = copy.deepcopy(ema)
    with pytest.warns(UserWarning, match="NaN or Inf"):
        assert skipped.metrics()["ema/nonfinite_elements"] == 1


def test_nothing_is_copied_in_a_swap() -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.5)
    with ema.swap():
        for call in (copy.deepcopy, pickle.dumps):
            with pytest.raises(SwapError, match="copying or pickling"):
                call(ema)


def copied_by_several(mode: str) -> list[str]:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    found = []
    for call in (copy.deepcopy, pickle.dumps):
        with pytest.raises(StateError) as caught:
            call(ema)
        found.append(str(caught.value))
    with ema.swap():  # nothing has happened to it
        pass
    ema.close()
    return found


@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2", "fsdp1"])
def test_what_belongs_to_several_ranks_is_not_copied(worlds: Worlds, mode: str) -> None:
    for messages in worlds[2].run(copied_by_several, mode):
        assert all("Save it with ema.save()" in message for message in messages)


# ---------------------------------------------------------------------- others' checkpoints


class Holder:
    """Something of the user's own, which DCP can only pickle."""

    def __init__(self, ema: ShardedEMA) -> None:
        self.ema = ema


def below_the_top(mode: str, folder: str) -> list[tuple[str, str]]:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9)
    found = []
    inside = Holder(ema)
    for state in ({"train": {"ema": ema, "step": 3}}, {"averages": [ema]}, {"all": inside}):
        for call in (_save, _save_later):
            try:
                call(state, f"{folder}/x")
            except BaseException as error:  # DCP's own is none that Exception covers
                found.append((type(error).__name__, str(error)))
            else:
                found.append(("nothing", ""))
    ema.update()  # it still works
    return found


def _save(state: dict[str, Any], path: str) -> None:
    dcp.save(state, checkpoint_id=path)


def _save_later(state: dict[str, Any], path: str) -> None:
    dcp.async_save(state, checkpoint_id=path).result()


@pytest.mark.parametrize(("mode", "size"), [("plain", 1), ("plain", 2), ("fsdp2", 2), ("ddp", 2)])
def test_an_average_below_the_top_level_is_refused(
    worlds: Worlds, mode: str, size: int, tmp_path: Path
) -> None:
    for found in worlds[size].run(below_the_top, mode, str(tmp_path)):
        assert len(found) == 6
        assert "lies under 'train.ema', below the top level" in found[0][1]
        for name, message in found:
            assert name in ("CheckpointException", "CheckpointWriteError"), message
            assert "below the top level" in message


def test_a_state_below_the_top_level_is_restored(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    ema, into = ShardedEMA(first, 0.5), ShardedEMA(second, 0.5)
    ema.update()
    state = {"train": {"ema": ema.state_dict(), "step": torch.tensor(3)}}
    dcp.save(state, checkpoint_id=tmp_path / "x", no_dist=True)
    target = {"train": {"ema": into.state_dict(), "step": torch.tensor(0)}}
    dcp.load(target, checkpoint_id=tmp_path / "x", no_dist=True)
    into.load_state_dict(target["train"]["ema"])
    assert into.num_updates == 1
    assert torch.equal(into.state_dict()["ema.weight"], first.weight)


def with_rows(rows: int) -> tuple[nn.Module, ShardedEMA]:
    """A model whose last layer has fewer rows than there are ranks, after all others."""
    torch.manual_seed(rows)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, rows))
    model[1].weight.requires_grad_(rows != 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, ShardedEMA(model, 0.9)


def empty_on_some(rows: int, path: str) -> str:
    _, ema = with_rows(rows)
    expected = averages(ema)
    group = dist.new_group(backend="gloo")
    try:
        dcp.async_save({"ema": ema}, checkpoint_id=path, process_group=group).result()
    except TypeError as error:
        return str(error)
    model, again = with_rows(rows)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again.reseed()
    dcp.load({"ema": again}, checkpoint_id=path)
    assert_equal(averages(again), expected)
    local = [v.to_local() for v in ema.state_dict().values() if isinstance(v, DTensor)]
    assert any(not shard.numel() for shard in local) == (rank() >= rows)
    for each in (ema, again):
        each.close()
    return ""


@pytest.mark.parametrize("rows", [1, 2])
def test_an_asynchronous_save_of_empty_shards(worlds: Worlds, rows: int, tmp_path: Path) -> None:
    for reason in worlds[3].run(empty_on_some, rows, str(tmp_path / "x")):
        if reason:
            assert "use its own save(asynchronous=True)" in reason
            pytest.skip(reason)
