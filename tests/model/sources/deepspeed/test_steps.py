"""One update for every step that an engine applies, and none for any other."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from sharded_ema import ShardedEMA
from sharded_ema.errors import OptimizerError, SwapError
from tests.helpers.engines import Engine, build
from tests.helpers.layouts import as_float, assert_equal, rank, reference_step
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]


def train(run: Engine, ema: ShardedEMA, steps: int, micro: int, bad: int, only_rank: int) -> None:
    """``steps`` boundaries, gradients of one being Inf or NaN on one rank; the average follows."""
    expected = as_float(run.masters())
    for index in range(steps):
        before, shadow = run.masters(), averages(ema)
        for part in range(micro):
            loss = run.loss(10 * index + part)
            if index == bad and part == micro - 1 and rank() == only_rank:
                loss = loss * float("nan")
            run.engine.backward(loss)
            run.engine.step()
            if part < micro - 1:
                assert_equal(averages(ema), shadow)
        if index == bad:
            assert_equal(run.masters(), before)
            assert_equal(averages(ema), shadow)
        else:
            reference_step(expected, run.masters(), 1 - 0.9)
    assert_equal(averages(ema), expected)


def overflow(stage: int, precision: str, micro: int, changes: dict[str, Any]) -> tuple[int, float]:
    run = build(stage, precision, gradient_accumulation_steps=micro, **changes)
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    train(run, ema, 6, micro, bad=2, only_rank=1)
    answer = ema.num_updates, ema.metrics()["ema/skipped_steps"]
    ema.close()
    run.engine.destroy()
    return answer


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "changes"),
    [
        (0, "fp16", 1, {}),
        (1, "fp16", 1, {}),
        (2, "fp16", 2, {}),
        (3, "fp16", 1, {}),
        (0, "bf16", 2, {}),
        (1, "bf16", 2, {}),
        (1, "bf16", 2, {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, "bf16", 2, {"zero": {"round_robin_gradients": True}}),
        (3, "bf16", 2, {"zero": {"sub_group_size": 40}}),
    ],
)
def test_skipped_steps_are_not_counted(
    engine_worlds: Worlds, stage: int, precision: str, micro: int, changes: dict[str, Any]
) -> None:
    for updates, skipped in engine_worlds[2].run(overflow, stage, precision, micro, changes):
        assert (updates, skipped) == (5, 1)


def autocast_overflow() -> tuple[int, float, int]:
    """A GradScaler inside the engine skips, and the engine says that it has applied the step."""
    run = build(0, torch_autocast={"enabled": True, "dtype": "float16"})
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    moved, said = 0, []
    for index in range(12):  # the first ones are skipped, because the scaler starts too high
        before = run.masters()
        loss = run.loss(index) * (float("inf") if index == 10 else 1.0)
        run.engine.backward(loss)
        run.engine.step()
        moved += not torch.equal(before["inp.weight"], run.masters()["inp.weight"])
        said.append(run.engine.was_step_applied())
    assert all(said), "DeepSpeed has learned to tell; EngineHooks may become simpler"
    answer = ema.num_updates, ema.metrics()["ema/skipped_steps"], moved
    ema.close()
    run.engine.destroy()
    return answer


def test_steps_that_a_scaler_skips_are_not_counted(engine_worlds: Worlds) -> None:
    for updates, skipped, moved in engine_worlds[2].run(autocast_overflow):
        assert 0 < moved < 12
        assert (updates, skipped) == (moved, 12 - moved)


def accelerated(stage: int) -> tuple[int, int]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    from tests.helpers.engines import Model, config

    # What its launcher sets; the process group exists, so nobody connects to the address.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_DEEPSPEED="true")
    settings = config(stage, gradient_accumulation_steps=2)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        gradient_accumulation_steps=2,
    )
    torch.manual_seed(0)
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    ema = ShardedEMA(engine, 0.9)
    ema.attach()
    run = Engine(engine, stage)
    expected = as_float(run.masters())
    moved = 0
    for index in range(6):
        with accelerator.accumulate(engine):
            accelerator.backward(run.loss(index))
            optimizer.step()
            optimizer.zero_grad()
        if index % 2:
            moved += 1
            reference_step(expected, run.masters(), 1 - 0.9)
    assert_equal(averages(ema), expected)
    updates = ema.num_updates
    ema.close()
    engine.destroy()
    AcceleratorState._reset_state(reset_partial_state=True)
    return updates, moved


@pytest.mark.parametrize("stage", [1, 3])
def test_accelerate(engine_worlds: Worlds, stage: int) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    assert engine_worlds[2].run(accelerated, stage) == [(3, 3)] * 2


def attach_and_remove() -> None:
    run = build(2, "bf16")
    attributes = set(run.engine.__dict__)
    hooks = run.engine.optimizer.optimizer._optimizer_step_post_hooks
    own = len(hooks)
    step = run.engine.step
    ema = ShardedEMA(run.engine, 0.9)
    handle = ema.attach()
    assert set(run.engine.__dict__) - attributes == {"step", "save_checkpoint", "load_checkpoint"}
    run.step(0)
    handle.remove()
    handle.remove()
    assert set(run.engine.__dict__) == attributes and len(hooks) == own
    assert run.engine.step == step
    run.step(1)
    assert ema.num_updates == 1
    ema.attach(checkpoint=False)
    assert set(run.engine.__dict__) - attributes == {"step"}
    # Somebody else wraps the engine after us: taking ours away must not take theirs.
    inner, calls = run.engine.step, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    run.engine.step = theirs
    run.step(2)
    ema.close()
    run.step(3)
    assert calls == [1, 1] and run.engine.step is theirs
    run.engine.destroy()


def test_removing_restores_the_engine(engine_worlds: Worlds) -> None:
    engine_worlds[2].run(attach_and_remove)


def refuse_in_swap(folder: str) -> list[str]:
    run = build(1, "bf16")
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    run.step(0)
    before = run.masters()
    run.engine.backward(run.loss(1))
    calls = [
        run.engine.step,
        lambda: run.engine.save_checkpoint(folder),
        lambda: run.engine.load_checkpoint(folder),
        ema.update,
        lambda: ema.swap().__enter__(),
    ]
    said = []
    with ema.swap():
        for call in calls:
            try:
                call()
            except SwapError as error:
                said.append(str(error).split(" is not allowed")[0])
    assert_equal(run.masters(), before)
    run.engine.step()  # the gradients are still there
    assert ema.num_updates == 2
    ema.close()
    run.engine.destroy()
    return said


def test_what_a_swap_refuses(engine_worlds: Worlds, tmp_path: Any) -> None:
    for said in engine_worlds[2].run(refuse_in_swap, str(tmp_path)):
        assert said == [
            "an optimizer step",
            "engine.save_checkpoint()",
            "engine.load_checkpoint()",
            "update()",
            "a second swap()",
        ]
    assert not list(tmp_path.iterdir())


def step_unattached(stage: int, precision: str) -> list[str]:
    run = build(stage, precision)
    ema = ShardedEMA(run.engine, 0.9)
    run.step(0)
    ema.update()
    before = run.masters()
    run.engine.backward(run.loss(1))
    with ema.swap(), pytest.raises(SwapError) as caught:
        run.engine.step()
    assert_equal(run.masters(), before)
    ema.close()
    run.engine.destroy()
    return [str(caught.value)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_in_the_swap_of_an_average_that_is_not_attached(
    engine_worlds: Worlds, stage: int, precision: str
) -> None:
    for said in engine_worlds[2].run(step_unattached, stage, precision):
        assert said[0].startswith("an optimizer step is not allowed")


def attachments() -> tuple[str, list[int]]:
    run = build(1)
    ema = ShardedEMA(run.engine, 0.9)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(OptimizerError) as refused:
        ema.attach(other)
    counts = []
    for index, own in enumerate((run.engine, run.engine.optimizer)):
        handle = ema.attach(own)
        run.step(index)
        counts.append(ema.num_updates)
        handle.remove()
    ema.close()
    run.engine.destroy()
    return str(refused.value), counts


def test_an_engine_is_attached_with_nothing_or_itself(engine_worlds: Worlds) -> None:
    for text, counts in engine_worlds[2].run(attachments):
        assert "knows its own optimizer, which a SGD is not" in text
        assert counts == [1, 2]


def nonfinite_weights() -> tuple[float, bool]:
    """Plain fp32 without ZeRO applies steps of NaN gradients; the average stays finite."""
    run = build(0, "fp32")
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    run.step(0)
    run.engine.backward(run.loss(1) * float("nan"))
    run.engine.step()
    finite = all(bool(torch.isfinite(t).all()) for t in averages(ema).values())
    count = ema.metrics()["ema/nonfinite_elements"]
    ema.close()
    run.engine.destroy()
    return count, finite


def test_nan_that_an_engine_applies_stays_out(engine_worlds: Worlds) -> None:
    for count, finite in engine_worlds[2].run(nonfinite_weights):
        assert count > 0 and finite
