"""The average of a ZeRO run is that of its masters: bit-equal, silent, and of the promised size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from sharded_ema import Power, ShardedEMA, Warmup
from sharded_ema.errors import BindError, EMAError
from tests.helpers.engines import Engine, Model, build
from tests.helpers.layouts import (
    ENGINES,
    PLAIN_ENGINES,
    as_float,
    assert_equal,
    rank,
    reference_step,
)
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]


def label(case: tuple[int, int, str, dict[str, Any]]) -> str:
    size, stage, precision, changes = case
    words = [w for k, v in changes.items() for w in (v if k == "zero" else [k])]
    return "-".join([str(size), f"zero{stage}", precision, *words])


EVERY = pytest.mark.parametrize(
    ("size", "stage", "precision", "changes"), ENGINES, ids=[label(c) for c in ENGINES]
)


def train_and_compare(stage: int, precision: str, changes: dict[str, Any]) -> None:
    run = build(stage, precision, **changes)
    schedules = {"fast": 0.9, "warm": Warmup(0.999)}
    ema = ShardedEMA(run.engine, schedules)
    ema.attach()
    expected = {name: as_float(run.masters()) for name in schedules}
    for index in range(20):
        run.step(index)
        now = run.masters()
        reference_step(expected["fast"], now, 1 - 0.9)
        reference_step(expected["warm"], now, 1 - Warmup(0.999).decay(index + 1))
    assert ema.num_updates == 20
    for name in schedules:
        assert_equal(averages(ema, name), expected[name])
        assert not torch.equal(expected[name]["inp.weight"], run.masters()["inp.weight"])
    # The tied weight goes by its first name, and the frozen one is stored and not averaged.
    assert "tied.weight" not in expected["fast"] and "frozen" not in ema.names
    frozen = ema.state_dict()["_frozen.frozen"]
    assert frozen.shape == (5,)
    ema.close()
    run.engine.destroy()


@EVERY
def test_equals_plain_loop_over_masters(
    engine_worlds: Worlds, size: int, stage: int, precision: str, changes: dict[str, Any]
) -> None:
    engine_worlds[size].run(train_and_compare, stage, precision, changes)


def outputs_of(run: Engine, average: dict[str, Tensor]) -> Tensor:
    """What one process computes with the average in the model's dtype."""
    model = Model()
    model.load_state_dict({**model.state_dict(), **average}, strict=True)
    model.tied.weight = model.inp.weight
    model.to(run.dtype)
    x = torch.linspace(-1, 1, 21).view(3, 7).to(run.dtype)
    with torch.no_grad():
        return model(x).float()


def bytes_of_buffers(module: nn.Module) -> int:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = {n: t for n, t in module.state_dict().items() if n not in parameters}
    return sum(buffer.numel() * buffer.element_size() for buffer in state.values())


def swap_and_go_on(stage: int, precision: str, changes: dict[str, Any]) -> None:
    never = build(stage, precision, **changes)
    losses = [never.step(index) for index in range(8)]
    final = never.masters()
    never.engine.destroy()

    run = build(stage, precision, **changes)
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    seen = [run.step(index) for index in range(3)]
    masters, before, average = run.masters(), run.evaluate(), averages(ema)
    lists = {n: v for n, v in vars(run.engine.optimizer).items() if isinstance(v, list)}
    for _ in range(2):
        with ema.swap():
            assert torch.equal(run.evaluate(), outputs_of(run, average))
            assert not torch.equal(run.evaluate(), before)
            dtype = run.dtype
            inside = {n: w for n, w in run.weights().items() if n in average}
            assert_equal(inside, {n: t.to(dtype) for n, t in average.items()})
            if stage and precision != "fp32":
                assert ema.memory["swap_backup"] == bytes_of_buffers(run.module)
        assert torch.equal(run.evaluate(), before)
        assert_equal(run.masters(), masters)
        assert_equal(averages(ema), average)
        assert all(vars(run.engine.optimizer)[name] is found for name, found in lists.items())
    seen += [run.step(index) for index in range(3, 8)]
    assert seen == losses
    assert_equal(run.masters(), final)
    ema.close()
    run.engine.destroy()


@EVERY
def test_swap_is_the_average_and_leaves_no_trace(
    engine_worlds: Worlds, size: int, stage: int, precision: str, changes: dict[str, Any]
) -> None:
    engine_worlds[size].run(swap_and_go_on, stage, precision, changes)


def count_collectives(stage: int, precision: str, changes: dict[str, Any]) -> tuple[int, int, int]:
    run = build(stage, precision, **changes)
    run.step(0)
    with CommDebugMode() as silent:
        ema = ShardedEMA(run.engine, 0.9)
        for _ in range(10):
            ema.update()
        ema.state_dict()
    with CommDebugMode() as control:
        run.step(1)
    memory = ema.memory
    assert memory["shadow"] == memory["ideal"]
    ema.close()
    run.engine.destroy()
    return silent.get_total_counts(), control.get_total_counts(), memory["shadow"]


@pytest.mark.parametrize(("size", "stage", "precision", "changes"), PLAIN_ENGINES + ENGINES[8:14])
def test_no_collectives_and_four_bytes_per_owned_element(
    engine_worlds: Worlds, size: int, stage: int, precision: str, changes: dict[str, Any]
) -> None:
    answers = engine_worlds[size].run(count_collectives, stage, precision, changes)
    for ours, control, _ in answers:
        assert ours == 0
        assert control > 0
    # Each element belongs to one rank; padding belongs to none.
    trained = sum(p.numel() for p in Model().parameters() if p.requires_grad)
    assert sum(shadow for *_, shadow in answers) == 4 * trained


def swap_mid_accumulation(stage: int) -> None:
    runs = [build(stage, "bf16", gradient_accumulation_steps=2) for _ in range(2)]
    never, swapped = runs
    ema = ShardedEMA(swapped.engine, 0.9)
    ema.attach()
    for index in range(6):
        never.step(index)
        swapped.step(index)
        with ema.swap():
            swapped.evaluate()
    assert ema.num_updates == 3
    assert_equal(swapped.masters(), never.masters())
    ema.close()
    for run in runs:
        run.engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_swap_between_micro_batches(engine_worlds: Worlds, stage: int) -> None:
    engine_worlds[2].run(swap_mid_accumulation, stage)


def exception_on_one_rank(stage: int) -> list[str]:
    never, swapped = build(stage, "bf16"), build(stage, "bf16")
    ema = ShardedEMA(swapped.engine, 0.9)
    ema.attach()
    for index in range(3):
        never.step(index)
        swapped.step(index)
    caught = []
    try:
        with ema.swap():
            swapped.evaluate()
            if rank() == 1:
                raise KeyError("one rank only")
    except (KeyError, EMAError) as error:
        caught.append(f"{type(error).__name__} {error}")
    for index in range(3, 6):
        never.step(index)
        swapped.step(index)
    assert_equal(swapped.masters(), never.masters())
    ema.close()
    for run in (never, swapped):
        run.engine.destroy()
    return caught


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_exception_in_a_swap(engine_worlds: Worlds, stage: int) -> None:
    first, second = engine_worlds[2].run(exception_on_one_rank, stage)
    assert second == ["KeyError 'one rank only'"]
    # Without ZeRO leaving is local, so only the rank that failed hears of it.
    assert len(first) == (1 if stage else 0)
    assert not first or "rank 1 left the swap() block with KeyError" in first[0]


def swap_in_inference_mode(stage: int) -> None:
    never, swapped = build(stage, "bf16"), build(stage, "bf16")
    ema = ShardedEMA(swapped.engine, 0.9)
    ema.attach()
    for index in range(3):
        for run in (never, swapped):
            run.step(index)
        with torch.inference_mode(), ema.swap():
            swapped.evaluate()
    assert_equal(swapped.masters(), never.masters())
    ema.close()
    for run in (never, swapped):
        run.engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_swap_in_inference_mode(engine_worlds: Worlds, stage: int) -> None:
    engine_worlds[2].run(swap_in_inference_mode, stage)


def decayed_at_the_start() -> None:
    """DeepSpeed's first, empty step decays the masters of stage 0 and leaves the weights."""
    run = build(0, "bf16", weight_decay=0.5)
    weights, masters = run.weights(), run.masters()
    assert any(not torch.equal(weights[n], m.to(run.dtype)) for n, m in masters.items())
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    with ema.swap():
        assert_equal(
            {n: w for n, w in run.weights().items() if n in masters},
            {n: m.to(run.dtype) for n, m in masters.items()},
        )
    assert_equal(run.weights(), weights)
    assert_equal(run.masters(), masters)
    run.step(0)
    with ema.swap():
        assert ema.memory["swap_backup"] == bytes_of_buffers(run.module)
    ema.close()
    run.engine.destroy()


def test_masters_that_weight_decay_moved_before_the_first_step(engine_worlds: Worlds) -> None:
    engine_worlds[2].run(decayed_at_the_start)


def masters_that_are_the_weights() -> None:
    """As DeepSpeed's source means fp32 stage 3 to be, though its test for it never holds."""
    run = build(3)
    optimizer = run.engine.optimizer
    masters, weights = (
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
    )
    for master, weight in zip(masters, weights, strict=True):
        master.data = weight.data
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    for index in range(3):
        run.step(index)
    before, average = run.masters(), averages(ema)
    with ema.swap():
        copies = ema.memory["swap_backup"] - bytes_of_buffers(run.module)
        assert copies == ema.memory["ideal"]
        assert_equal({n: w for n, w in run.weights().items() if n in average}, average)
        assert_equal(averages(ema), average)
    assert_equal(run.masters(), before)
    assert_equal(averages(ema), average)
    ema.close()
    run.engine.destroy()


def test_masters_that_share_memory_with_the_weights(engine_worlds: Worlds) -> None:
    engine_worlds[2].run(masters_that_are_the_weights)


def keep_for_good(stage: int, precision: str) -> None:
    run = build(stage, precision)
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    for index in range(3):
        run.step(index)
    average = averages(ema)
    ema.copy_to()
    assert_equal(run.masters(), average)
    inside = {n: w for n, w in run.weights().items() if n in average}
    assert_equal(inside, {n: t.to(run.dtype) for n, t in average.items()})
    run.step(3)
    assert ema.num_updates == 4
    ema.close()
    run.engine.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_copy_to_overwrites_the_masters(engine_worlds: Worlds, stage: int, precision: str) -> None:
    engine_worlds[2].run(keep_for_good, stage, precision)


def averaged_buffers(stage: int) -> None:
    run = build(stage, "fp32")
    ema = ShardedEMA(run.engine, {"ema": Power(sigma_rel=0.1)}, buffers="average")
    ema.attach()
    expected = run.module.running.clone()
    for index in range(4):
        with torch.no_grad():
            run.module.running += 1.0
        run.step(index)
        expected.lerp_(run.module.running, 1 - Power(sigma_rel=0.1).decay(index + 1))
    with ema.swap():
        assert torch.equal(run.module.running, expected)
    assert run.module.running.tolist() == [4.0] * 3
    ema.close()
    run.engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_averaged_buffers(engine_worlds: Worlds, stage: int) -> None:
    engine_worlds[2].run(averaged_buffers, stage)


def weights_that_are_not_the_masters(stage: int) -> list[str]:
    run = build(stage, "bf16")
    run.step(0)
    with torch.no_grad():
        if rank() == 1:
            parameter = run.module.out.bias
            target = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
            target.add_(1.0)
    said = []
    ema = ShardedEMA(run.engine, 0.9)
    for call in (ema.attach, lambda: ema.swap().__enter__()):
        try:
            call()
        except BindError as error:
            said.append(str(error))
    assert "step" not in run.engine.__dict__  # a refused attachment leaves nothing behind
    ema.close()
    run.engine.destroy()
    return said


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_self_check_names_the_parameter_on_all_ranks(engine_worlds: Worlds, stage: int) -> None:
    first, second = engine_worlds[2].run(weights_that_are_not_the_masters, stage)
    assert first == second
    assert len(first) == 2
    assert all("rank 1: the weights of parameter out.bias are not" in text for text in first)
