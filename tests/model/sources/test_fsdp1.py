"""FSDP1's own states and refusals; what it shares with every layout is in the other files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import ShardedEMA, consolidate
from tests.checkpoint.test_store import error_of
from tests.helpers.layouts import (
    Block,
    Ragged,
    Run,
    as_float,
    assert_equal,
    build,
    rank,
    reference_step,
    world,
)
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]
CPU = torch.device("cpu")


def wrap(module: nn.Module, **options: Any) -> FSDP:
    return FSDP(module, **{"device_id": CPU, "use_orig_params": True, **options})


def mesh() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


# ---------------------------------------------------------------------- which tensors there are


def inventories(mode: str) -> None:
    reference = ShardedEMA(Ragged(), 0.9)
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9)
    assert sorted(ema.names) == sorted(reference.names)
    shapes = {s.name.fqn: s.shape for s in reference._model.reader.shards}
    assert {s.name.fqn: s.shape for s in ema._model.reader.shards} == shapes
    assert {s.name.fqn: s.name.aliases for s in ema._model.reader.shards}["inp.weight"] == (
        "tied.weight",
    )
    some = ShardedEMA(run.target, 0.9, include=["blocks.*", "tied.*"], exclude="*.up.*")
    assert sorted(some.names) == ["blocks.0.down.weight", "blocks.1.down.weight", "inp.weight"]
    run.step(0)
    some.update()
    assert_equal(averages(some), {n: t.lerp(run.gather()[n], 0.1) for n, t in start(mode, some)})
    for each in (reference, ema, some):
        each.close()


def start(mode: str, ema: ShardedEMA) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in build(mode).gather().items() if name in ema.names]


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp1_flat", "fsdp1_no_shard"])
def test_names_and_patterns_are_those_of_the_bare_model(worlds: Worlds, mode: str) -> None:
    worlds[2].run(inventories, mode)


class Backbone(nn.Module):
    """A frozen part and a trained one, which FSDP1 flattens apart or together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(7, 5), nn.Linear(5, 3)
        self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def frozen_part(flat: bool, path: str) -> None:
    model = Backbone()
    body = {f"body.{n}": p.detach().clone() for n, p in model.body.named_parameters()}
    if flat:
        model.body = wrap(model.body, use_orig_params=False)
    target = wrap(model, use_orig_params=not flat)
    ema = ShardedEMA(target, 0.9)
    assert ema.names == ["head.weight", "head.bias"]
    assert sorted(n.fqn for n in ema._model.inventory.frozen) == sorted(body)
    assert sum(gathered(ema.memory["shadow"])) == 4 * (5 * 3 + 3)
    ema.attach(torch.optim.SGD([p for p in target.parameters() if p.requires_grad], lr=0.1))
    target(torch.ones(2, 7)).square().mean().backward()
    ema.save(path, step=1)
    ema.close()
    if rank() == 0:
        assert consolidate(path, path + "-out", progress=False).ok
        found = load_file(Path(path + "-out", "model.safetensors"))
        assert found.keys() == Backbone().state_dict().keys()
        assert_equal({name: found[name] for name in body}, body)


@pytest.mark.parametrize("flat", [False, True])
def test_frozen_parameters_are_stored_and_not_averaged(
    worlds: Worlds, flat: bool, tmp_path: Path
) -> None:
    worlds[3].run(frozen_part, flat, str(tmp_path / "ema"))


def wrapped_again() -> None:
    """Activation checkpointing and torch.compile rename modules, and FSDP1 knows old names."""
    torch.manual_seed(0)
    bare = Ragged()
    inner = wrap(bare, ignored_states=[bare.scalar])
    apply_activation_checkpointing(inner, check_fn=lambda m: isinstance(m, Block))
    target = torch.compile(inner, backend="eager")
    optimizer = torch.optim.AdamW([p for p in target.parameters() if p.requires_grad], lr=1e-2)
    run = Run(target, bare, optimizer, [bare.scalar], rank(), {})
    ema = ShardedEMA(target, 0.9)
    assert sorted(ema.names) == sorted(dict(Ragged().named_parameters()).keys() - {"frozen"})

    def now() -> dict[str, Tensor]:
        with FSDP.summon_full_params(inner, writeback=False):
            return {
                name.replace("_checkpoint_wrapped_module.", ""): p.detach().clone()
                for name, p in bare.named_parameters()
                if p.requires_grad
            }

    expected = now()
    ema.attach(optimizer)
    for index in range(3):
        run.step(index)
        reference_step(expected, now(), 1 - 0.9)
    assert_equal(averages(ema), expected)
    before = now()
    with ema.swap():
        assert_equal(now(), expected)
        run.evaluate()
    assert_equal(now(), before)
    ema.close()


def test_activation_checkpointing_and_compile(worlds: Worlds) -> None:
    worlds[2].run(wrapped_again)


# ---------------------------------------------------------------------- the states of a unit


def between_forward_and_backward(mode: str) -> None:
    """The shards can be read although gathered parameters are registered, and nothing is freed."""
    never, run = build(mode), build(mode)
    ema = ShardedEMA(run.target, 0.5)
    for each in (never, run):
        each.step(0)
    before = run.gather()
    loss = run.target(torch.ones(2, 7, dtype=next(run.bare.parameters()).dtype)).float().mean()
    ema.update()
    for name, average in averages_without_settling(ema).items():
        assert torch.equal(
            average, build(mode).gather()[name].float().lerp(before[name].float(), 0.5)
        )
    loss.backward()
    run.optimizer.step()
    never.target(
        torch.ones(2, 7, dtype=next(never.bare.parameters()).dtype)
    ).float().mean().backward()
    never.optimizer.step()
    assert_equal(run.gather(), never.gather())
    ema.close()


def averages_without_settling(ema: ShardedEMA) -> dict[str, Tensor]:
    settle, ema._model.settle = ema._model.settle, lambda: None  # type: ignore[method-assign]
    try:
        return averages(ema)
    finally:
        ema._model.settle = settle  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp1_flat", "fsdp1_grad_op", "fsdp1_no_shard"])
def test_update_between_forward_and_backward(worlds: Worlds, mode: str) -> None:
    worlds[2].run(between_forward_and_backward, mode)


def while_all_is_gathered(mode: str) -> None:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9)
    expected = as_float(run.gather())
    run.step(0)
    with FSDP.summon_full_params(run.target, writeback=False):
        ema.update()
    reference_step(expected, run.gather(), 1 - 0.9)
    assert_equal(averages(ema), expected)
    ema.close()


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp1_flat"])
def test_update_inside_summon_full_params(worlds: Worlds, mode: str) -> None:
    worlds[2].run(while_all_is_gathered, mode)


def evaluation_with_gradients(mode: str) -> None:
    """Without a backward SHARD_GRAD_OP goes on showing what it has gathered."""
    never, run = build(mode), build(mode)
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    for index in range(3):
        for each in (never, run):
            each.step(index)
        run.target(torch.ones(2, 7))
        with ema.swap():
            run.target(torch.ones(2, 7))
    assert_equal(run.gather(), never.gather())
    ema.close()


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp1_grad_op"])
def test_swap_after_a_forward_with_gradients_and_no_backward(worlds: Worlds, mode: str) -> None:
    worlds[2].run(evaluation_with_gradients, mode)


def full_precision_evaluation() -> None:
    """FSDP1 keeps a second gathered copy then."""
    os.environ["FSDP_USE_FULL_PREC_IN_EVAL"] = "1"
    try:
        run = build("fsdp1_mixed")
    finally:
        del os.environ["FSDP_USE_FULL_PREC_IN_EVAL"]
    ema = ShardedEMA(run.target, 0.5)
    ema.attach(run.optimizer)
    for index in range(3):
        run.step(index)

    def evaluate() -> Tensor:
        run.target.eval()
        out = run.evaluate()
        run.target.train()
        return out

    expected = Ragged()
    expected.load_state_dict({**expected.state_dict(), **averages(ema)}, strict=True)
    expected.tied.weight = expected.inp.weight
    raw = evaluate()
    with ema.swap(), torch.no_grad():
        x = torch.linspace(-1, 1, 21).view(3, 7)
        assert torch.equal(evaluate(), expected(x))
    assert torch.equal(evaluate(), raw)
    ema.close()


def test_swap_with_full_precision_in_evaluation(worlds: Worlds) -> None:
    worlds[2].run(full_precision_evaluation)


def without_sync(mode: str) -> None:
    """Gradients accumulate whole, and SHARD_GRAD_OP leaves parameters gathered meanwhile."""
    never, run = build(mode), build(mode)
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    for index in range(4):
        for each in (never, run):
            with each.target.no_sync():  # type: ignore[operator]
                each.step(index, backward_only=True)
        with ema.swap():
            run.evaluate()
        for each in (never, run):
            each.step(index + 10)
    assert_equal(run.gather(), never.gather())
    ema.close()


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp1_flat", "fsdp1_grad_op"])
def test_swap_between_micro_batches_without_sync(worlds: Worlds, mode: str) -> None:
    worlds[2].run(without_sync, mode)


def one_rank_logs(mode: str) -> None:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    run.step(0)
    run.evaluate()  # leaves parameters gathered
    if rank() == 0:
        assert ema.metrics()["ema/num_updates"] == 1
    run.step(1)
    ema.close()


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp2"])
def test_one_rank_alone_may_ask_for_metrics(worlds: Worlds, mode: str) -> None:
    worlds[2].run(one_rank_logs, mode)


# ---------------------------------------------------------------------- replicas


def undivided(path: str) -> None:
    """Without division a swap is local; of the copies one is written."""
    run = build("fsdp1_hybrid")
    divided = ShardedEMA(run.target, 0.9)
    ema = ShardedEMA(run.target, 0.9, shard_replicas=False)
    assert abs(ema.memory["shadow"] - 2 * divided.memory["shadow"]) <= 4 * 8
    expected = as_float(run.gather())
    for index in range(2):
        run.step(index)
        reference_step(expected, run.gather(), 1 - 0.9)
        divided.update()
        ema.update()
    assert_equal(averages(ema), expected)
    written = sum(shard.numel for shard in ema._model.reader.shards if shard.writes)
    assert sum(gathered(written)) == sum(tensor.numel() for tensor in expected.values())
    ema.save(path, step=2)
    divided.load(path)
    assert_equal(averages(divided), expected)
    if rank() == 0:  # nobody else comes
        with ema.swap():
            pass
    for each in (divided, ema):
        each.close()


def test_replicas_that_are_not_divided(worlds: Worlds, tmp_path: Path) -> None:
    worlds[4].run(undivided, str(tmp_path / "ema"))


def several_strategies() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    model[0] = wrap(model[0], sharding_strategy=ShardingStrategy.NO_SHARD)
    model[1] = wrap(model[1], sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh())
    target = wrap(model)
    ema = ShardedEMA(target, 0.9)

    def now() -> dict[str, Tensor]:
        with FSDP.summon_full_params(target, writeback=False):
            named = model.named_parameters()
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in named}

    expected = now()
    optimizer = torch.optim.AdamW(target.parameters(), lr=0.1)
    ema.attach(optimizer)
    for index in range(3):
        target(torch.full((2, 5), float(rank() + index))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reference_step(expected, now(), 1 - 0.9)
    assert_equal(averages(ema), expected)
    assert sum(gathered(ema.memory["shadow"])) == 4 * 3 * (5 * 5 + 5)
    before = now()
    with ema.swap():
        assert_equal(now(), expected)
    assert_equal(now(), before)
    ema.close()


def gathered(value: int) -> list[int]:
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def test_units_with_different_strategies_in_one_model(worlds: Worlds) -> None:
    worlds[4].run(several_strategies)


def differing_replicas(strategy: ShardingStrategy) -> tuple[str, str]:
    torch.manual_seed(rank())
    hybrid = {"device_mesh": mesh()} if strategy == ShardingStrategy.HYBRID_SHARD else {}
    target = wrap(nn.Linear(5, 5), sharding_strategy=strategy, **hybrid)
    ema = ShardedEMA(target, 0.9)
    found = error_of(lambda: ema.attach(torch.optim.SGD(target.parameters(), lr=0.1)))
    ema.close()
    return found


def test_replicas_that_start_with_different_weights_are_refused(worlds: Worlds) -> None:
    for strategy in (ShardingStrategy.NO_SHARD, ShardingStrategy.HYBRID_SHARD):
        for found in worlds[4].run(differing_replicas, strategy):
            assert found[0] == "BindError"
            assert "parameter weight" in found[1]
    # Sharded units are made of what each rank contributes, whatever the others hold.
    for found in worlds[4].run(differing_replicas, ShardingStrategy.FULL_SHARD):
        assert found[0] == "nothing"


# ---------------------------------------------------------------------- refusals


def with_ddp() -> None:
    ShardedEMA(wrap(DistributedDataParallel(nn.Linear(4, 4))), 0.9)


def with_fully_shard() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (world(),)))
    model[1] = wrap(model[1])
    ShardedEMA(model, 0.9)


def with_tensor_parallel() -> None:
    axes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 4))
    parallelize_module(model, axes["tp"], {"0": ColwiseParallel()})
    ShardedEMA(wrap(model, device_mesh=axes["dp"]), 0.9)


def with_dtensor_beside() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parallelize_module(model, init_device_mesh("cpu", (world(),)), {"0": ColwiseParallel()})
    ShardedEMA(wrap(model, ignored_modules=[model[0]]), 0.9)


def with_holes() -> None:
    model = nn.Linear(4, 400)  # its bias keeps PyTorch from noticing
    model.weight = nn.Parameter(torch.randn(40, 8)[:, :4])
    ShardedEMA(wrap(model), 0.9)


def on_different_ranks() -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    model[1] = wrap(model[1], process_group=pairs[rank() // 2])
    ShardedEMA(wrap(model), 0.9)


def with_shards_of_one_rank() -> None:
    axes = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    strategy = ShardingStrategy.HYBRID_SHARD
    ShardedEMA(wrap(nn.Linear(4, 4), sharding_strategy=strategy, device_mesh=axes), 0.9)


def inside_a_unit(orig: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 4), use_orig_params=orig))
    wrap(model, use_orig_params=orig)
    ShardedEMA(model, 0.9)


def below_a_unit(orig: bool, nested: bool) -> None:
    inner = wrap(nn.Linear(4, 4), use_orig_params=orig) if nested else nn.Linear(4, 4)
    part = nn.Sequential(nn.Linear(4, 4), inner)
    model = wrap(nn.Sequential(part, nn.Linear(4, 4)), use_orig_params=orig)
    with torch.no_grad():
        model(torch.ones(2, 4))
    ShardedEMA(part, 0.9)


def optimizer_of_the_bare_model() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(wrap(model, use_orig_params=False), 0.9)
    ema.attach(optimizer)


def swap_in_summoned_parameters() -> None:
    run = build("fsdp1")
    run.step(0)
    ema = ShardedEMA(run.target, 0.9)
    with FSDP.summon_full_params(run.target, writeback=False):
        ema.update()  # reads the shards
        with ema.swap():
            pass


def other_memory(mode: str) -> None:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9)
    run.step(0)
    ema.update()
    for parameter in run.bare.parameters():
        parameter.data = parameter.data * 2
    ema.update()


def moved_after_the_first_forward() -> None:
    run = build("fsdp1")
    run.target.double()  # before it, anything goes
    ema = ShardedEMA(run.target, 0.9)
    run.step(0)
    ema.update()
    run.target.float()
    ema.update()


REFUSALS: dict[str, tuple[Callable[[], None], str, str]] = {
    "ddp": (with_ddp, "UnsupportedLayoutError", "DistributedDataParallel in one model"),
    "fully_shard": (with_fully_shard, "UnsupportedLayoutError", "fully_shard in one model"),
    "tensor parallel": (with_tensor_parallel, "UnsupportedLayoutError", "0.weight is a DTensor"),
    "dtensor": (with_dtensor_beside, "UnsupportedLayoutError", "weight of Linear is a DTensor"),
    "holes": (with_holes, "UnsupportedLayoutError", "shape (40, 4) and strides (8, 1)"),
    "ranks": (on_different_ranks, "UnsupportedLayoutError", "that of a Conv1d on ["),
    "one shard": (with_shards_of_one_rank, "UnsupportedLayoutError", "shard groups of one rank"),
    "inside": (partial(inside_a_unit, True), "BindError", "outside the target"),
    "inside, flat": (partial(inside_a_unit, False), "BindError", "outside the target"),
    **{
        f"below, {orig=}, {nested=}": (partial(below_a_unit, orig, nested), "BindError", "outside")
        for orig in (False, True)
        for nested in (False, True)
    },
    "optimizer": (optimizer_of_the_bare_model, "OptimizerError", "after wrapping"),
    "summon": (swap_in_summoned_parameters, "StateError", "summon_full_params"),
    "data": (partial(other_memory, "fsdp1"), "StateError", "param.data"),
    "data, flat": (partial(other_memory, "fsdp1_flat"), "StateError", "param.data"),
    "moved": (moved_after_the_first_forward, "StateError", "first forward"),
}


def refuse(name: str) -> tuple[str, str]:
    return error_of(REFUSALS[name][0])


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_is_named_on_every_rank(worlds: Worlds, name: str) -> None:
    _, error, text = REFUSALS[name]
    for found in worlds[4].run(refuse, name):
        assert found[0] == error, found
        assert text in found[1]
