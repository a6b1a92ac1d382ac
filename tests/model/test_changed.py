"""What happens to a sharded model or its optimizer after the average was made."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.optim import ZeroRedundancyOptimizer

from sharded_ema import ShardedEMA
from sharded_ema.errors import BindError, EMAError, EMAWarning, StateError
from tests.helpers.layouts import Run, as_float, assert_equal, build, reference_step, sizes
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]
CHANGED = ("ddp", "fsdp2", "hsdp", "tp", "fsdp1", "fsdp1_flat", "fsdp1_hybrid")


def error_of(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except EMAError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@torch.no_grad()
def perturb(run: Run) -> None:
    """Change this rank's part of every parameter in place, as an optimizer would."""
    for module in run.bare.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter in run.bare.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.25)


def converted(mode: str) -> list[tuple[str, str]]:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.5, **run.options)
    expected = as_float(build(mode).gather())
    dtypes = [torch.float64, torch.bfloat16]
    if mode.startswith("fsdp1"):
        dtypes.pop()  # it takes up a conversion only until its first use
    else:
        run.step(0)
        ema.update()
        reference_step(expected, run.gather(), 0.5)
    for dtype in dtypes:
        run.target.to(dtype)
        perturb(run)
        ema.update()
        reference_step(expected, run.gather(), 0.5)
    assert_equal(averages(ema), expected)
    before = run.gather()
    with ema.swap():
        assert_equal(run.gather(), {n: t.to(dtypes[-1]) for n, t in expected.items()})
    assert_equal(run.gather(), before)
    ema.close()
    late = build(mode)
    late_ema = ShardedEMA(late.target, 0.5, **late.options)
    late.step(0)
    late.target.double()
    found = [error_of(late_ema.update)]
    if found[0][0] == "nothing":
        found.append(error_of(late_ema.state_dict))
    return found


@pytest.mark.parametrize("mode", CHANGED)
def test_converted_parameters_are_followed(worlds: Worlds, mode: str) -> None:
    (size,) = sizes(mode, [2])
    for found in worlds[size].run(converted, mode):
        if mode.startswith("fsdp1"):
            assert found[0][0] == StateError.__name__
            assert "model.to() came after the first forward" in found[0][1]
        else:
            assert [name for name, _ in found] == ["nothing"] * 2


def replaced(mode: str) -> list[tuple[str, str]]:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    run.step(0)
    ema.update()
    run.bare.out = nn.Linear(10, 2)
    return [error_of(call) for call in (lambda: ema.swap().__enter__(), ema.state_dict)]


@pytest.mark.parametrize("mode", CHANGED)
def test_a_submodule_in_the_place_of_another_is_refused(worlds: Worlds, mode: str) -> None:
    (size,) = sizes(mode, [2])
    for found in worlds[size].run(replaced, mode):
        for name, message in found:
            assert name == BindError.__name__
            assert "parameter out.weight was replaced" in message


def assigned(mode: str, ignored: bool) -> tuple[bool, str, str]:
    """Whether the model took the values, and what the average says."""
    run = build(mode)
    ema = ShardedEMA(run.target, 0.5, **run.options)
    before = run.gather()
    whole = run.target.state_dict()
    state = {
        name: value + 1
        for name, value in whole.items()
        if name.endswith(("scalar", "frozen")) == ignored
    }
    run.target.load_state_dict(state, assign=True, strict=False)
    after = run.gather()
    found = error_of(ema.state_dict)
    assert error_of(ema.update) == found
    if found[0] == "nothing":
        expected = as_float(before)
        reference_step(expected, after, 0.5)
        assert_equal(averages(ema), expected)
    return any(not torch.equal(after[name], before[name]) for name in before), *found


@pytest.mark.parametrize("mode", CHANGED)
def test_assigned_parameters_are_refused(worlds: Worlds, mode: str) -> None:
    """FSDP1 loses what is assigned to a flattened parameter: model and average stay as they are."""
    (size,) = sizes(mode, [2])
    for ignored in (False, True):  # by FSDP1, which cannot flatten them
        lost = mode.startswith("fsdp1") and not ignored
        for moved, name, message in worlds[size].run(assigned, mode, ignored):
            assert moved != lost
            assert name == ("nothing" if lost else BindError.__name__)
            assert lost or "was replaced" in message


def gathered(mode: str) -> None:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.5, **run.options)
    expected = as_float(run.gather())
    for index in range(2):
        run.step(index)
        run.evaluate()  # what fully_shard has gathered for it stays
        ema.update()
        ema.metrics()
        reference_step(expected, run.gather(), 0.5)
    assert_equal(averages(ema), expected)


@pytest.mark.parametrize("mode", [*CHANGED, "tp_fsdp2"])
def test_gathered_parameters_are_no_others(worlds: Worlds, mode: str) -> None:
    for size in sizes(mode, [2]):
        worlds[size].run(gathered, mode)


# ---------------------------------------------------------------------- optimizers


def redundancy(stop: bool) -> list[str]:
    run = build("ddp")
    parameters = [p for p in run.bare.parameters() if p.requires_grad]
    run.optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2)
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    expected = as_float(run.gather())
    for index in range(3):
        run.step(index)
        reference_step(expected, run.gather(), 1 - 0.9)
    assert_equal(averages(ema), expected)
    assert ema.num_updates == 3
    if stop:  # the one inside has no hooks of ours
        ema.metrics()
        for _ in range(2):
            run.step(4, backward_only=True)
            run.optimizer.optim.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema.close()
    return [str(w.message) for w in caught if w.category is EMAWarning]


@pytest.mark.parametrize("stop", [False, True])
def test_zero_redundancy_optimizer(worlds: Worlds, stop: bool) -> None:
    for messages in worlds[2].run(redundancy, stop):
        stalled = [m for m in messages if "no optimizer step was counted after step 3" in m]
        assert len(stalled) == stop


def compiled(run: Run, graphs: list[str]) -> Callable[[int], None]:
    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        graphs.append(graph.code)
        return graph.forward

    def train(index: int) -> None:
        run.target(torch.full((4, 7), 1.0 + index)).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()

    return torch.compile(train, backend=backend)


def compiled_step(mode: str) -> int | str:
    try:
        compiled(build(mode), [])(0)
    except RuntimeError as error:  # PyTorch 2.11
        return str(error)
    finally:
        torch._dynamo.reset()
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    expected = as_float(run.gather())
    graphs: list[str] = []
    train = compiled(run, graphs)
    for index in range(3):
        train(index)
        reference_step(expected, run.gather(), 1 - 0.9)
    assert_equal(averages(ema), expected)
    assert ema.num_updates == 3
    ema.close()
    torch._dynamo.reset()
    return len(graphs)


def test_a_compiled_function_with_forward_backward_and_step(worlds: Worlds) -> None:
    found = worlds[2].run(compiled_step, "fsdp2")
    if isinstance(found[0], str):
        pytest.skip(f"this PyTorch cannot compile such a step, without an average: {found[0]}")
    assert all(graphs > 0 for graphs in found)
