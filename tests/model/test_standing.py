"""Several averages of one model, or of models that share parameters: what one does to the other."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sharded_ema import ShardedEMA, inspect
from sharded_ema.errors import SwapError
from tests.helpers import engines
from tests.helpers.layouts import as_float, assert_equal, build, reference_step, sizes
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]
# Of the BatchNorm below, whose statistics are not the subject.
pytestmark = pytest.mark.filterwarnings("ignore:.*buffers with running statistics")
DECAYS = {"slow": 0.9, "fast": 0.5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.tied = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.body(x)) + self.tied(x))


def train(net: nn.Module, *emas: ShardedEMA, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(steps):
        net(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for ema in emas:
            ema.update()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def the_same(net: Net) -> tuple[ShardedEMA, ShardedEMA]:
    return ShardedEMA(net, {"slow": 0.9}), ShardedEMA(net, {"fast": 0.5})


def a_part(net: Net) -> tuple[ShardedEMA, ShardedEMA]:
    return ShardedEMA(net, {"slow": 0.9}, include="*.bias"), ShardedEMA(net, {"fast": 0.5})


def parts_that_share(net: Net) -> tuple[ShardedEMA, ShardedEMA]:
    return ShardedEMA(net.body, {"slow": 0.9}), ShardedEMA(net.tied, {"fast": 0.5})


def another_module(net: Net) -> tuple[ShardedEMA, ShardedEMA]:
    return ShardedEMA(net, {"slow": 0.9}), ShardedEMA(nn.ModuleList([net.head]), {"fast": 0.5})


def the_same_memory(net: Net) -> tuple[ShardedEMA, ShardedEMA]:
    other = nn.Linear(3, 3)
    other.weight.data = net.head.weight.data
    return ShardedEMA(net, {"slow": 0.9}), ShardedEMA(other, {"fast": 0.5})


SHARED: dict[str, Callable[[Net], tuple[ShardedEMA, ShardedEMA]]] = {
    make.__name__: make
    for make in (the_same, a_part, parts_that_share, another_module, the_same_memory)
}
CALLS: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "a second swap()": lambda ema, path: ema.swap().__enter__(),
    "copy_to()": lambda ema, path: ema.copy_to(),
    "reseed()": lambda ema, path: ema.reseed(),
    "update()": lambda ema, path: ema.update(),
    "load()": lambda ema, path: ema.load(path),
    "load_state_dict()": lambda ema, path: ema.load_state_dict({}),
    "metrics(distance=True)": lambda ema, path: ema.metrics(distance=True),
    "close()": lambda ema, path: ema.close(),
}


@pytest.mark.parametrize("shared", SHARED)
def test_what_one_refuses_while_another_stands_in(shared: str, tmp_path: Path) -> None:
    net = Net()
    first, second = SHARED[shared](net)
    train(net, first, second)
    second.save(tmp_path / "x", step=3)
    before, average = weights(net), averages(second, "fast")
    for _ in range(2):
        for what, call in CALLS.items():
            with first.swap(), pytest.raises(SwapError) as caught:
                call(second, tmp_path / "x")
            assert str(caught.value).startswith(f"{what} is not allowed while the average 'slow' ")
            assert "another ShardedEMA stands in for " in str(caught.value)
        assert_equal(weights(net), before)
        assert_equal(averages(second, "fast"), average)
        second.update()  # which is its right again
        average = averages(second, "fast")


def test_the_message_names_the_shared_parameters() -> None:
    net = Net()
    first, second = parts_that_share(net)
    with first.swap(), pytest.raises(SwapError, match="stands in for weight; leave"):
        second.update()
    first, second = the_same(net)
    with first.swap(), pytest.raises(SwapError, match=r"for body\.weight and 6 more; leave"):
        second.update()


def test_averages_are_not_made_or_attached_of_an_average() -> None:
    net = Net()
    first, second = the_same(net)
    train(net, first, second)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with first.swap():
        with pytest.raises(SwapError, match=r"^making a ShardedEMA is not allowed"):
            ShardedEMA(net, 0.5)
        with pytest.raises(SwapError, match=r"^attach\(\) is not allowed"):
            second.attach(optimizer)
    second.attach(optimizer)


def test_what_one_may_do_while_another_stands_in(tmp_path: Path) -> None:
    net = Net()
    first, second = the_same(net)
    train(net, first, second)
    want = averages(second, "fast")
    with first.swap():
        second.save(tmp_path / "x", step=3)
        assert second.metrics()["ema/num_updates"] == 3
        assert_equal(averages(second, "fast"), want)
    (average,) = inspect(tmp_path / "x").facts["averages"]
    distances = {p["name"]: p["sampled_distance_to_live_weights"] for p in average["profiles"]}
    assert "fast" in distances and not any(distances.values()), "the weights are another's"
    second.reseed()
    second.load(tmp_path / "x")
    assert_equal(averages(second, "fast"), want)


def test_an_average_that_has_not_begun_is_not_taken_from_another(tmp_path: Path) -> None:
    net = Net()
    first, second = ShardedEMA(net, {"slow": 0.9}), ShardedEMA(net, {"fast": 0.5}, start_step=9)
    train(net, first, second)
    with first.swap():
        second.metrics()
        for call in (second.state_dict, lambda: second.save(tmp_path / "x", step=3)):
            with pytest.raises(SwapError, match="an average before its start_step is not allowed"):
                call()
    assert not list(tmp_path.iterdir())
    state = second.state_dict()
    assert torch.equal(state["fast.head.weight"], net.head.weight)


def test_what_one_stores_as_it_is_is_no_average_of_another(tmp_path: Path) -> None:
    net = Net()
    net.head.requires_grad_(False)
    second = ShardedEMA(net, {"fast": 0.5}, exclude=["norm.*", "body.*"])
    net.head.requires_grad_(True)
    thawed = ShardedEMA(net, {"slow": 0.9}, include="head.*")
    statistics = ShardedEMA(net.norm, {"slow": 0.9}, buffers="average")
    for first, name in ((thawed, "head.weight"), (statistics, "norm.running_mean")):
        with first.swap():
            for call in (second.state_dict, lambda: second.save(tmp_path / "x", step=3)):
                with pytest.raises(SwapError, match=f"stands in for {name} and 1 more"):
                    call()
            second.update()


def test_averages_of_different_parts_go_in_and_out_as_they_like() -> None:
    net = Net()
    first = ShardedEMA(net, {"slow": 0.9}, include="head.*")
    second = ShardedEMA(net, {"fast": 0.5}, exclude="head.*")
    train(net, first, second)
    before = weights(net)
    expected = averages(first, "slow") | averages(second, "fast")
    for order in ((first, second), (second, first)):
        for leave in (order, order[::-1]):
            swaps = {ema: ema.swap() for ema in order}
            for swap in swaps.values():
                swap.__enter__()
            inside = {n: p.detach().clone() for n, p in net.named_parameters()}
            assert_equal(inside, expected)
            for ema in leave:
                swaps[ema].__exit__(None, None, None)
            assert_equal(weights(net), before)
    with first.swap():
        second.update()
        second.reseed()
    assert second.num_updates == 0


def test_a_model_of_its_own_trains_on() -> None:
    mine, other = Net(), Net()
    ema, theirs = ShardedEMA(mine, 0.9), ShardedEMA(other, 0.5)
    expected = {n: p.detach().clone() for n, p in other.named_parameters()}
    with ema.swap():
        train(other, theirs, steps=1)
    for name, parameter in other.named_parameters():
        assert torch.equal(averages(theirs)[name], expected[name].lerp(parameter.detach(), 0.5))


def test_a_step_in_the_swap_of_an_average_that_is_not_attached() -> None:
    net = Net()
    first, second = the_same(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    second.attach(optimizer)
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    before, state = weights(net), str(optimizer.state_dict())
    with first.swap():
        for _ in range(2):
            with pytest.raises(SwapError, match=r"an optimizer step is not allowed.*'slow'"):
                optimizer.step()
    assert_equal(weights(net), before)
    assert str(optimizer.state_dict()) == state and second.num_updates == 1
    second.close()
    third = ShardedEMA(net, 0.5)
    with third.swap(), pytest.raises(SwapError, match="an optimizer step"):
        torch.optim.SGD(net.norm.parameters(), lr=0.1).step()
    with third.swap():
        torch.optim.SGD(Net().parameters(), lr=0.1).step()


def test_a_swap_that_was_dropped_or_failed_stands_in_for_nothing() -> None:
    net = Net()
    first, second = the_same(net)
    with pytest.raises(KeyError), first.swap():
        raise KeyError
    swap = first.swap()
    swap.__enter__()
    del swap
    gc.collect()
    second.update()
    with first.swap():
        del first
        gc.collect()
        with pytest.raises(SwapError):
            second.update()


# ---------------------------------------------------------------------- layouts


def of_parts(mode: str) -> None:
    never, run = build(mode), build(mode)
    first = ShardedEMA(run.target, 0.9, include="blocks.*", **run.options)
    second = ShardedEMA(run.target, 0.5, exclude="blocks.*", **run.options)
    whole = ShardedEMA(run.target, 0.7, **run.options)
    for ema in (first, second, whole):
        ema.attach(run.optimizer)
    expected = as_float(run.gather())
    for index in range(3):
        never.step(index)
        run.step(index)
        now = run.gather()
        for part, decay in (("blocks.", 0.9), ("", 0.5)):
            names = [n for n in now if n.startswith("blocks.") == bool(part)]
            mine = {n: expected[n] for n in names}
            reference_step(mine, {n: now[n] for n in names}, 1 - decay)
        swaps = {ema: ema.swap() for ema in (first, second)}
        for ema in (first, second)[:: -1 if index % 2 else 1]:
            swaps[ema].__enter__()
            with pytest.raises(SwapError, match="another ShardedEMA"):
                whole.update()
            with pytest.raises(SwapError, match="another ShardedEMA"):
                whole.swap().__enter__()
        assert_equal(
            {n: t.float() for n, t in run.gather().items()},
            as_float({n: expected[n].to(t.dtype) for n, t in now.items()}),
        )
        run.evaluate()
        for ema in (first, second)[:: -1 if index == 1 else 1]:
            swaps[ema].__exit__(None, None, None)
            run.evaluate()
        assert_equal(run.gather(), now)
        whole.metrics(distance=True)
    assert_equal(run.gather(), never.gather())
    for ema in (first, second, whole):
        ema.close()


@pytest.mark.parametrize(
    "mode",
    [
        *("ddp", "ddp_bf16", "fsdp2", "fsdp2_mixed", "hsdp", "replicate", "tp_fsdp2"),
        *("fsdp1", "fsdp1_flat", "fsdp1_no_shard", "fsdp1_hybrid_flat"),
    ],
)
def test_averages_of_parts_in_a_layout(worlds: Worlds, mode: str) -> None:
    worlds[sizes(mode, [2])[0]].run(of_parts, mode)


def of_parts_of_an_engine(stage: int, precision: str) -> None:
    never = engines.build(stage, precision)
    losses = [never.step(index) for index in range(4)]
    never.engine.destroy()
    run = engines.build(stage, precision)
    first = ShardedEMA(run.engine, 0.9, include="blocks.*")
    second = ShardedEMA(run.engine, 0.5, exclude="blocks.*")
    for ema in (first, second):
        ema.attach()
    for index in range(4):
        assert run.step(index) == losses[index]
        before = run.weights()
        expected = averages(first) | averages(second)
        expected = {n: t.to(run.dtype) for n, t in expected.items()}
        for leave_first in (first, second):
            swaps = {ema: ema.swap() for ema in (first, second)}
            for swap in swaps.values():
                swap.__enter__()
            assert_equal({n: run.weights()[n] for n in expected}, expected)
            swaps.pop(leave_first).__exit__(None, None, None)
            left = averages(second if leave_first is first else first)
            inside = before | {n: expected[n] for n in left}
            assert_equal(run.weights(), inside)
            run.evaluate()
            (last,) = swaps.values()
            last.__exit__(None, None, None)
            assert_equal(run.weights(), before)
    first.close()
    second.close()
    run.engine.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_averages_of_parts_of_an_engine(engine_worlds: Worlds, stage: int, precision: str) -> None:
    engine_worlds[2].run(of_parts_of_an_engine, stage, precision)
