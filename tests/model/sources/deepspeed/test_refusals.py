"""What is no engine, not supported, or not trained is named before anything is averaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sharded_ema import ShardedEMA
from sharded_ema.errors import BindError, EMAError, EMAWarning, StateError, UnsupportedLayoutError
from tests.helpers.engines import Model, build, config, deepspeed
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]


def refusal(make: Callable[[], Any]) -> tuple[str, str]:
    try:
        make()
    except EMAError as error:
        return type(error).__name__, str(error)
    return "accepted", ""


def module_of_an_engine(stage: int) -> tuple[str, str]:
    run = build(stage, "bf16")
    answer = refusal(lambda: ShardedEMA(run.module, 0.9))
    run.engine.destroy()
    return answer


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_module_inside_an_engine(engine_worlds: Worlds, stage: int) -> None:
    for kind, text in engine_worlds[2].run(module_of_an_engine, stage):
        assert kind == BindError.__name__
        assert "pass the engine" in text


def altered_engines() -> list[tuple[str, str]]:
    """Engines that cannot be made here, by the marks that they would bear."""
    run = build(2, "bf16")
    engine, answers = run.engine, []

    def attempt(target: Any, name: str, value: Any) -> None:
        before = getattr(target, name, None)
        setattr(target, name, value)
        answers.append(refusal(lambda: ShardedEMA(engine, 0.9)))
        if before is None:
            delattr(target, name)
        else:
            setattr(target, name, before)

    class ZenFlowZeroOptimizer(type(engine.optimizer)):  # type: ignore[misc]
        pass

    attempt(engine.optimizer, "__class__", ZenFlowZeroOptimizer)
    attempt(engine.optimizer, "swap_optimizer", True)
    attempt(engine, "mp_world_size", 2)
    attempt(engine.module.out.weight, "allreduce", False)
    attempt(deepspeed, "__version__", "0.14.2")
    answers.append(refusal(lambda: ShardedEMA(engine, 0.9)))
    engine.destroy()
    return answers


def test_what_is_not_supported_is_named(engine_worlds: Worlds) -> None:
    expected = [
        "the engine's optimizer is a ZenFlowZeroOptimizer",
        "NVMe",
        "tensor parallelism is not supported",
        "parameter out.weight is an expert",
        "DeepSpeed 0.14.2 is not supported",
    ]
    for answers in engine_worlds[2].run(altered_engines):
        for (kind, text), match in zip(answers[:-1], expected, strict=True):
            assert kind == UnsupportedLayoutError.__name__
            assert match in text
        assert answers[-1][0] == "accepted", "the attempts undid what they had altered"


def some_parameters_in_no_group(stage: int) -> tuple[list[str], list[str]]:
    torch.manual_seed(0)
    model = Model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for n, p in model.named_parameters() if "block" in n]),
        config=config(stage, "bf16"),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EMAWarning)
        ema = ShardedEMA(engine, 0.9)
    names = ema.names
    assert "_frozen.inp.weight" in ema.state_dict()
    ema.close()
    engine.destroy()
    return names, [str(w.message) for w in caught if issubclass(w.category, EMAWarning)]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_parameters_that_nobody_trains(engine_worlds: Worlds, stage: int) -> None:
    for names, (text,) in engine_worlds[2].run(some_parameters_in_no_group, stage):
        assert names and all(name.startswith("blocks.") for name in names)
        assert "in no parameter group of the engine" in text


def masters_that_are_elsewhere() -> tuple[str, int]:
    """As after ``engine.offload_states()``, which a CPU cannot do."""
    run = build(2, "bf16")
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    run.step(0)
    masters = run.engine.optimizer.single_partition_of_fp32_groups
    kept = [master.data for master in masters]
    for master in masters:
        master.data = torch.empty(0)
    text = ""
    try:
        ema.update()
    except StateError as error:
        text = str(error)
    for master, data in zip(masters, kept, strict=True):
        master.data = data
    before = averages(ema)
    run.step(1)
    assert any(not torch.equal(before[n], t) for n, t in averages(ema).items())
    updates = ema.num_updates
    ema.close()
    run.engine.destroy()
    return text, updates


def test_masters_out_of_memory(engine_worlds: Worlds) -> None:
    for text, updates in engine_worlds[2].run(masters_that_are_elsewhere):
        assert "are not in memory; call engine.reload_states()" in text
        assert updates == 2
