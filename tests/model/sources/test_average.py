"""The sharded average is the average: bit-equal to a plain loop, silent, undisturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from sharded_ema import Power, ShardedEMA, Warmup
from sharded_ema.model.pieces import FlatShard
from tests.helpers.layouts import (
    MODES,
    Run,
    all_whole,
    as_float,
    assert_equal,
    build,
    rank,
    reference_step,
    sizes,
    whole,
    world,
)
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]


def averages(ema: ShardedEMA, profile: str = "ema") -> dict[str, Tensor]:
    """Full averages, put together from the state dict without the code under test."""
    start = f"{profile}."
    state = {k.removeprefix(start): v for k, v in ema.state_dict().items() if k.startswith(start)}
    flat = {name: value for name, value in state.items() if isinstance(value, FlatShard)}
    full = all_whole({name: value for name, value in state.items() if name not in flat})
    mine = {
        name: [(box.offsets, box.sizes, piece.numpy()) for box, piece in value.pieces]
        for name, value in flat.items()
    }
    everyone: list[Any] = [mine] * world()
    if flat and world() > 1:
        torch.distributed.all_gather_object(everyone, mine)
    for name, value in flat.items():
        full[name] = torch.full(value.shape, float("nan"))
        for pieces in everyone:
            for offset, extent, piece in pieces[name]:
                place = tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))
                full[name][place] = torch.from_numpy(piece.copy())
    return {name: full[name] for name in state}


def train_and_compare(mode: str, steps: int) -> None:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.99, **run.options)
    ema.attach(run.optimizer)
    expected = as_float(run.gather())
    for index in range(steps):
        run.step(index)
        reference_step(expected, run.gather(), 1 - 0.99)
        if index % 10 == 3:
            assert_equal(averages(ema), expected)
    assert_equal(averages(ema), expected)
    assert any(not torch.equal(expected[n], v.float()) for n, v in run.gather().items())
    assert ema.num_updates == steps
    ema.close()


LAYOUTS = [(mode, size) for mode in MODES for size in sizes(mode)]


@pytest.mark.parametrize(("mode", "size"), LAYOUTS)
def test_equals_plain_loop_over_50_steps(worlds: Worlds, mode: str, size: int) -> None:
    worlds[size].run(train_and_compare, mode, 50)


def put_together_as_pytorch_does(mode: str) -> None:
    """What the comparisons here put together themselves, because that is faster."""
    run = build(mode)
    run.step(0)
    sharded = {n: p for n, p in run.bare.named_parameters() if isinstance(p, DTensor)}
    assert sharded
    assert_equal(all_whole(sharded), {n: p.full_tensor().detach() for n, p in sharded.items()})


@pytest.mark.parametrize(
    ("mode", "size"), [(m, n) for m in ("fsdp2", "fsdp2_dim1", "hsdp") for n in sizes(m)]
)
def test_whole_tensors_are_those_of_pytorch(worlds: Worlds, mode: str, size: int) -> None:
    worlds[size].run(put_together_as_pytorch_does, mode)


def several_profiles(mode: str) -> None:
    schedules = {"fast": 0.9, "warm": Warmup(0.999), "power": Power(sigma_rel=0.1)}
    run = build(mode)
    ema = ShardedEMA(run.target, schedules, update_every=3, start_step=4)  # type: ignore[arg-type]
    ema.attach(run.optimizer)
    expected: dict[str, dict[str, Tensor]] = {}
    for index in range(17):
        run.step(index)
        n = index + 1 - 4
        if n == 0:
            expected = {name: as_float(run.gather()) for name in schedules}
        if n > 0 and n % 3 == 0:
            for name, average in expected.items():
                kept = 1.0
                for step in (n - 2, n - 1, n):
                    kept *= 0.9 if name == "fast" else schedules[name].decay(step)  # type: ignore
                reference_step(average, run.gather(), 1 - kept)
    for name, average in expected.items():
        assert_equal(averages(ema, name), average)
    assert ema.num_updates == 13
    ema.close()


@pytest.mark.parametrize("mode", ["fsdp2", "ddp", "fsdp2_bf16", "fsdp1"])
def test_profiles_with_windows_and_late_start(worlds: Worlds, mode: str) -> None:
    worlds[3].run(several_profiles, mode)


def count_collectives(mode: str) -> tuple[int, int]:
    run = build(mode)
    run.step(0)
    with CommDebugMode() as silent:
        ema = ShardedEMA(run.target, 0.9, **run.options)
        for _ in range(10):
            ema.update()
        ema.state_dict()
    with CommDebugMode() as control:
        run.step(1)
        run.gather()
        torch.distributed.all_reduce(torch.ones(1))
    ema.close()
    return silent.get_total_counts(), control.get_total_counts()


@pytest.mark.parametrize("mode", MODES)
def test_no_collectives(worlds: Worlds, mode: str) -> None:
    (size,) = sizes(mode, [3])
    for ours, control in worlds[size].run(count_collectives, mode):
        assert ours == 0
        assert control > 0


def measure_memory(mode: str) -> dict[str, int]:
    run = build(mode)
    ema = ShardedEMA(run.target, {"a": 0.9, "b": 0.99}, **run.options)
    memory = ema.memory
    total = sum(t.numel() for t in run.gather().values())
    replicated = sum(p.numel() for p in run.unsynced)
    ema.close()
    return {**memory, "total": 4 * 2 * total, "replicated": 4 * 2 * replicated}


@pytest.mark.parametrize("mode", MODES)
def test_every_element_has_one_owner(worlds: Worlds, mode: str) -> None:
    (size,) = sizes(mode, [4])
    ranks = worlds[size].run(measure_memory, mode)
    assert all(m["shadow"] == m["ideal"] == m["host"] for m in ranks)
    total, replicated = ranks[0]["total"], ranks[0]["replicated"]
    if mode == "hsdp_whole":  # two replicas, and of plain parameters four
        total = 2 * (total - replicated) + 4 * replicated
    assert sum(m["shadow"] for m in ranks) == total
    if mode.startswith("ddp"):
        shares = [m["shadow"] for m in ranks]
        assert max(shares) - min(shares) <= 4 * 2


def evaluate_first(mode: str) -> None:
    """FSDP2 leaves the root's parameters gathered after a forward without backward."""
    plain, disturbed = build(mode), build(mode)
    reference = ShardedEMA(plain.target, 0.9, **plain.options)
    ema = ShardedEMA(disturbed.target, 0.9, **disturbed.options)
    for index in range(4):
        plain.step(index)
        reference.update()
        disturbed.step(index)
        disturbed.evaluate()
        ema.update()
        disturbed.evaluate()
        with ema.swap():
            inside = {n: t.float() for n, t in disturbed.gather().items()}
            expected = averages(reference)
            dtype = next(disturbed.bare.parameters()).dtype
            assert_equal(inside, {n: t.to(dtype).float() for n, t in expected.items()})
            first = disturbed.evaluate()
            assert torch.equal(first, disturbed.evaluate())
        disturbed.evaluate()
    assert_equal(averages(ema), averages(reference))
    assert_equal(disturbed.gather(), plain.gather())
    late = build(mode)
    late.evaluate()
    late_ema = ShardedEMA(late.target, 0.9, **late.options)
    assert late_ema.names == ema.names
    for each in (reference, ema, late_ema):
        each.close()


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_forward_before_update_and_swap_changes_nothing(
    worlds: Worlds, mode: str
) -> None:
    (size,) = sizes(mode, [3])
    worlds[size].run(evaluate_first, mode)


def optimizer_state(run: Run) -> list[Tensor]:
    return [
        whole(value)
        for parameter in run.optimizer.state.values()
        for value in parameter.values()
        if isinstance(value, Tensor)
    ]


def swap_with_exception(mode: str, failing_rank: int) -> None:
    never, swapped = build(mode), build(mode)
    ema = ShardedEMA(swapped.target, 0.9, **swapped.options)
    ema.attach(swapped.optimizer)
    expected = as_float(swapped.gather())
    for index in range(3):
        never.step(index)
        swapped.step(index)
        reference_step(expected, swapped.gather(), 1 - 0.9)
    caught = 0
    try:
        with ema.swap():
            assert_equal(
                {n: t.float() for n, t in swapped.gather().items()},
                {n: t.to(swapped.gather()[n].dtype).float() for n, t in expected.items()},
            )
            swapped.evaluate()
            if rank() == failing_rank:
                raise KeyError("one rank only")
    except KeyError:
        caught = 1
    assert caught == (rank() == failing_rank)
    assert ema.memory["swap_backup"] == 0
    assert_equal(swapped.gather(), never.gather())
    for index in range(3, 6):
        never.step(index)
        swapped.step(index)
        reference_step(expected, swapped.gather(), 1 - 0.9)
    assert_equal(swapped.gather(), never.gather())
    assert len(optimizer_state(never)) > 10
    for a, b in zip(optimizer_state(never), optimizer_state(swapped), strict=True):
        assert torch.equal(a, b)
    assert_equal(averages(ema), expected)
    ema.close()


@pytest.mark.parametrize("mode", MODES)
def test_swap_with_exception_on_one_rank(worlds: Worlds, mode: str) -> None:
    (size,) = sizes(mode, [3])
    worlds[size].run(swap_with_exception, mode, 1)


def exception_in_a_forward(mode: str, grad: bool) -> None:
    """It leaves units gathered, and others being gathered ahead, with the average in them.

    Neither FSDP clears that up by itself.
    """
    never, run = build(mode), build(mode)
    blocks = list(run.bare.blocks)
    if isinstance(blocks[0], FSDPModule):
        blocks[0].set_modules_to_forward_prefetch(blocks[1:])  # type: ignore[arg-type]
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    for index in range(2):
        never.step(index)
        run.step(index)

    def fail(*_: Any) -> None:
        raise KeyError

    for register in (blocks[0].register_forward_hook, blocks[1].register_forward_pre_hook):
        handle = register(fail)
        with pytest.raises(KeyError), ema.swap(), torch.set_grad_enabled(grad):
            run.target(torch.ones(2, 7))
        handle.remove()
        assert torch.equal(run.evaluate(), never.evaluate())
    for index in range(2, 4):
        never.step(index)
        run.step(index)
    assert_equal(run.gather(), never.gather())
    ema.close()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "mode",
    [
        *("fsdp2", "replicate", "hsdp", "ddp"),
        *("fsdp1", "fsdp1_flat", "fsdp1_grad_op", "fsdp1_no_shard"),
    ],
)
def test_exception_in_the_forward_of_an_evaluation(worlds: Worlds, mode: str, grad: bool) -> None:
    (size,) = sizes(mode, [2])
    worlds[size].run(exception_in_a_forward, mode, grad)


def swap_mid_accumulation(mode: str) -> None:
    never, swapped = build(mode), build(mode)
    ema = ShardedEMA(swapped.target, 0.9, **swapped.options)
    ema.attach(swapped.optimizer)
    for index in range(6):
        for run in (never, swapped):
            run.step(index, backward_only=index % 2 == 0)
        with ema.swap():
            swapped.evaluate()
    assert_equal(swapped.gather(), never.gather())
    assert ema.num_updates == 3
    ema.close()


@pytest.mark.parametrize("mode", MODES)
def test_swap_between_micro_batches(worlds: Worlds, mode: str) -> None:
    (size,) = sizes(mode, [2])
    worlds[size].run(swap_mid_accumulation, mode)
