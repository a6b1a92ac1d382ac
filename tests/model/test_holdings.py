"""What the ranks hold, compared when they meet: equal, another part of the model, or wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.errors import CheckpointExistsError, EMAError
from sharded_ema.model.holdings import Tensors, find_differing
from sharded_ema.model.layout import Box
from tests.helpers.layouts import Ragged, assert_equal, rank, whole
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]


def refused(model: nn.Module | list[nn.Module], **options: Any) -> str:
    """What attach() says."""
    parts = model if isinstance(model, list) else [model]
    ema = ShardedEMA(model, 0.5, timeout=30, **options)
    try:
        ema.attach(torch.optim.SGD([p for m in parts for p in m.parameters()], lr=0.1))
    except EMAError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        ema.close()
    return "nothing"


# ---------------------------------------------------------------------- what must be the same


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def buffer_on_one() -> str:
    model = two_layers()
    if rank() == 1:
        model.register_buffer("statistics", torch.zeros(4))
    return refused(DistributedDataParallel(model, broadcast_buffers=False))


def other_shape() -> str:
    model = two_layers()
    model.register_buffer("statistics", torch.zeros(4 + rank()))
    return refused(DistributedDataParallel(model, broadcast_buffers=False))


def other_gradient() -> str:
    model = two_layers()
    model[0].bias.requires_grad_(rank() == 0)
    return refused(model)


def other_dtype() -> str:
    model = two_layers()
    if rank() == 1:
        model[1].bfloat16()
    return refused(model)


def other_patterns() -> str:
    return refused(two_layers(), exclude=() if rank() == 0 else "1.*")


def other_settings() -> str:
    return refused(two_layers(), update_every=1 + rank())


def plain_experts_beside_fsdp2() -> str:
    model = two_layers()
    expert = nn.Linear(3, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.add_module(f"expert_{rank()}", expert)
    return refused(model)


def plain_experts_of_one_name() -> str:
    model = two_layers()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    torch.manual_seed(rank())
    model.add_module("expert", nn.Linear(3, 3))
    return refused(model)


def replicas_of_other_seeds() -> str:
    torch.manual_seed(rank() // 2)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    axes = ("replicate", "shard")
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=axes))
    return refused(model)


def stages_of_one_name() -> str:
    torch.manual_seed(rank())
    return refused(nn.Sequential(nn.Linear(8, 8)))


REFUSED: dict[str, tuple[int, Any, list[str]]] = {
    "a buffer on one rank": (
        2, buffer_on_one, ["BindError", "rank 1 has statistics (a buffer, [4]", "rank 0 has not"],
    ),
    "a buffer of another shape": (
        2, other_shape, ["statistics is a buffer, [4] of torch.float32 on rank 0 and", "[5]"],
    ),
    "requires_grad": (2, other_gradient, ["0.bias is averaged", "frozen", "on rank 1"]),
    "a dtype": (2, other_dtype, ["torch.float32 on rank 0 and averaged", "torch.bfloat16"]),
    "patterns": (2, other_patterns, ["rank 0 has 1.bias (averaged", "which rank 1 has not"]),
    "settings": (2, other_settings, ["RanksDifferError", "update_every is 1 on ranks 0 and 2"]),
    "experts with names of their own": (
        2, plain_experts_beside_fsdp2, ["expert_0", "slice of one mesh", "exclude="],
    ),
    "experts of one name": (
        2, plain_experts_of_one_name, ["parameter expert.", "is not sharded", "Experts"],
    ),
    "replicas of other seeds": (
        4, replicas_of_other_seeds,
        ["parameter 0.", "is replicated and differs between rank 0 and rank 2", "Seed all"],
    ),
    "stages of one name": (2, stages_of_one_name, ["stages of a pipeline", "ModuleDict"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_differs_is_refused_by_name_at_attach(worlds: Worlds, case: str) -> None:
    size, program, said = REFUSED[case]
    told = worlds[size].run(program)
    assert len(set(told)) == 1, told
    for words in said:
        assert words in told[0]


def test_the_first_block_that_differs() -> None:
    box, other = Box((0,), (2,)), Box((2,), (2,))
    records = [{"a": (box, "1"), "b": (box, "2")}, {"a": (other, "3")}, {"b": (box, "4")}]
    assert find_differing(records) == ("b", 0, 2)
    assert find_differing(records[:2]) is None


def test_tensors_of_several_ranks_together() -> None:
    one = Tensors({"a": "x"}, ["a"], {"a": ["b"]}, [], ["f"], [])
    other = Tensors({"c": "x"}, ["c"], {"c": ["d"]}, ["e"], ["f"], ["lora"])
    joined = one.joined([other])
    assert joined == Tensors(
        {"a": "x", "c": "x"}, ["a", "c"], {"a": ["b"], "c": ["d"]}, ["e"], ["f"], ["lora"]
    )
    assert one.held == {"a": "x"}


# ---------------------------------------------------------------------- pipelines


class Whole(nn.Module):
    """A model of four layers with a tied embedding, and the parts of it that stages hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8, bias=False)
        self.layers = nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(4)})
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(2))

    def part(self, layers: list[int], *names: str) -> nn.Module:
        part = nn.Module()
        part.layers = nn.ModuleDict({str(i): self.layers[str(i)] for i in layers})
        for name in names:
            part.add_module(name, getattr(self, name))
        return part


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step whose gradients are the same wherever a parameter lies."""
    for parameter in parameters:
        parameter.grad = parameter.detach() * (0.1 * step) + 0.01 * step
    optimizer.step()


def expected(steps: int) -> dict[str, Tensor]:
    model = Whole()
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(1, steps + 1):
        train(parameters, optimizer, step)
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 0.5)
    return average


def parts_of(kind: str) -> tuple[list[nn.Module], dict[str, Any]]:
    """This rank's stages."""
    model = Whole()
    if kind in ("plain", "plain list"):
        mine = {0: ([0, 1], "embed"), 1: ([2, 3], "head")}[rank()]
        if kind == "plain list":  # interleaved: two stages on each rank
            return [model.part([2 * rank()], mine[1]), model.part([2 * rank() + 1])], {}
        return [model.part(mine[0], mine[1])], {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_local_rank("pp")
    part = model.part([2 * stage, 2 * stage + 1], "head" if stage else "embed")
    if kind == "fsdp2":
        fully_shard(part, mesh=mesh["dp"])
        return [part], {}
    if kind == "fsdp2 list":
        end = "head" if stage else "embed"
        halves = [model.part([2 * stage], end), model.part([2 * stage + 1])]
        for half in halves:
            fully_shard(half, mesh=mesh["dp"])
        return halves, {}
    part.forward = lambda x: x
    wrapped = DistributedDataParallel(part, process_group=mesh.get_group("dp"))
    return [wrapped], {"process_group": dist.group.WORLD}


def saved_pipeline(kind: str, path: str) -> list[str]:
    parts, options = parts_of(kind)
    ema = ShardedEMA(parts if "list" in kind else parts[0], 0.5, timeout=30, **options)
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    ema.attach(optimizer)
    for step in range(1, 4):
        train(parameters, optimizer, step)
    ema.save(path, step=3)
    ema.save(path + "-again", step=3, asynchronous=True).result()
    views = ema._average.shadow.views["ema"]
    values = [view.clone() for view in views]
    for view in views:
        view.zero_()
    assert ema.load(path, verify=True) == 3
    assert all(map(torch.equal, views, values))
    with ema.swap():
        pass
    names = ema.names
    ema.close()
    return names


KINDS = {"plain": 2, "plain list": 2, "fsdp2": 4, "fsdp2 list": 4, "ddp": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_saved_as_one_model(worlds: Worlds, kind: str, tmp_path: Path) -> None:
    names = worlds[KINDS[kind]].run(saved_pipeline, kind, str(tmp_path / "step_3"))
    assert set(names[0]) != set(names[-1])
    want = expected(3)
    for folder in ("step_3", "step_3-again"):
        consolidate(tmp_path / folder, tmp_path / f"{folder}-out", progress=False)
        got = load_file(tmp_path / f"{folder}-out" / "model.safetensors")
        # Each stage knows the tied weight by its own name; both are there, and equal.
        assert torch.equal(got["embed.weight"], got["head.weight"])
        assert_equal({name: got[name] for name in want}, want)


def tied_by_name(path: str, differ: bool) -> str:
    """A weight of the same name on both stages, which the user's program keeps equal."""
    model = Whole()
    part = model.part([0, 1], "embed") if rank() == 0 else model.part([2, 3], "embed")
    if differ and rank() == 1:
        with torch.no_grad():
            part.embed.weight[0, 0] += 1.0
    told = refused(part)
    if told != "nothing":
        return told
    ema = ShardedEMA(part, 0.5, timeout=30)
    ema.save(path, step=1)
    counted = [ema.names[i] for i in ema._model.counted_here]
    ema.close()
    return ",".join(sorted(counted))


def test_a_tied_weight_of_two_stages_is_written_and_counted_once(
    worlds: Worlds, tmp_path: Path
) -> None:
    first, second = worlds[2].run(tied_by_name, str(tmp_path / "a"), False)
    assert "embed.weight" in first and "embed.weight" not in second
    consolidate(tmp_path / "a", tmp_path / "out", progress=False)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert len([n for n in got if n.startswith("layers.")]) == 8


def test_tied_weights_of_two_stages_must_be_equal(worlds: Worlds, tmp_path: Path) -> None:
    for told in worlds[2].run(tied_by_name, str(tmp_path / "a"), True):
        assert "parameter embed.weight is not sharded but differs" in told


# ---------------------------------------------------------------------- two groups


def racing_groups(path: str) -> str:
    """Two stages that nothing says belong together save to one path."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_local_rank("pp")
    part = Whole().part([2 * stage, 2 * stage + 1])
    part.forward = lambda x: x
    model = DistributedDataParallel(part, process_group=mesh.get_group("dp"))
    ema = ShardedEMA(model, 0.5, timeout=30)
    for turn in range(2):  # one after the other, so that nothing else could tell
        if turn == stage:
            try:
                ema.save(path, step=1, replace=True)
                said = "saved"
            except CheckpointExistsError as error:
                said = str(error)
        dist.barrier()
    ema.close()
    return said


def test_two_groups_never_write_to_one_path(worlds: Worlds, tmp_path: Path) -> None:
    told = worlds[4].run(racing_groups, str(tmp_path / "a"))
    assert told[:2] == ["saved"] * 2
    for said in told[2:]:
        assert "the ranks [0, 1] of this job save their average" in said
        assert "process_group=" in said


def lacking_group() -> str:
    model = DistributedDataParallel(two_layers())
    groups = [dist.new_group([r]) for r in range(2)]
    try:
        ShardedEMA(model, 0.5, process_group=groups[rank()])
    except EMAError as error:
        return str(error)
    return "nothing"


def test_a_group_without_all_replicas_is_refused(worlds: Worlds) -> None:
    first, second = worlds[2].run(lacking_group)
    assert "lacks [1]" in first and "lacks [0]" in second


def mixed_axes() -> list[bool]:
    """One layer on each axis of a mesh alone and a plain one beside them, against a plain loop."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    parallelize_module(model[0], mesh["tp"], ColwiseParallel())
    fully_shard(model[1], mesh=mesh["dp"])
    ema = ShardedEMA(model, 0.5, timeout=30)
    average = {n: whole(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    ema.update()
    for name, parameter in model.named_parameters():
        average[name].lerp_(whole(parameter), 0.5)
    with ema.swap():
        found = [torch.equal(whole(p), average[n]) for n, p in model.named_parameters()]
    ema.close()
    return found


def test_layers_on_different_axes_of_one_mesh(worlds: Worlds) -> None:
    for found in worlds[4].run(mixed_axes):
        assert all(found)


def test_parts_that_are_no_modules_are_refused() -> None:
    with pytest.raises(EMAError, match=r"must be torch\.nn\.Modules"):
        ShardedEMA([nn.Linear(2, 2), "head"], 0.5)  # type: ignore[list-item]
    with pytest.raises(EMAError, match=r"two parts of the model have a parameter weight"):
        ShardedEMA([nn.Linear(2, 2), nn.Linear(2, 2)], 0.5)


def test_parts_are_one_model() -> None:
    model = Ragged()
    parts = [nn.ModuleDict({"inp": model.inp, "tied": model.tied}), nn.ModuleDict({"o": model.out})]
    ema = ShardedEMA(parts, 0.5)
    assert ema.names == ["inp.weight", "inp.bias", "o.weight", "o.bias"]
