"""A shadow on the host of parameters on a device: what waits for what, and that it is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sharded_ema import ShardedEMA
from sharded_ema.averaging.kernels import LerpPlan
from sharded_ema.errors import ConfigError, StateError
from sharded_ema.model.precision import real_view
from tests.helpers.accelerator import Accelerator, stand_in


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    return stand_in(monkeypatch)


def loop(shadow: Tensor, live: Tensor, weight: float) -> Tensor:
    """One update of elements, of which those that are not finite are left out."""
    value = live.to(shadow.dtype)
    return torch.where(torch.isfinite(value), torch.lerp(shadow, value, weight), shadow)


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    live = [torch.randn(n) for n in (1, 5, 3000, 4096, 20_001)]
    live += [torch.randn(n).bfloat16() for n in (7, 9000)] + [torch.randn(11, dtype=torch.double)]
    live += [torch.randn(30, 200).t(), torch.randn(40, 50)[:, ::2], torch.empty(0)]
    live.append(torch.randn(6, 8, dtype=torch.complex64))
    return live


@pytest.mark.parametrize("impl", ["foreach", None])
@pytest.mark.parametrize("buffer_bytes", [1 << 12, 1 << 27])
def test_equals_the_plain_loop(device: Accelerator, buffer_bytes: int, impl: str | None) -> None:
    live = tensors()
    live[3][17], live[6][8999] = float("nan"), float("inf")
    dtypes = [t.dtype if t.dtype.itemsize >= 8 else torch.float32 for t in live]
    seeds = [[torch.randn(t.shape).to(d) for t, d in zip(live, dtypes, strict=True)] for _ in "ab"]
    expected = copy.deepcopy(seeds)
    plan = LerpPlan(seeds, live, guard=True, impl=impl, buffer_bytes=buffer_bytes)
    (offload,) = plan._offloads
    taken = sum(t.nbytes for t in live)
    sent = max(chunk.sent.nbytes for chunk in offload._chunks)
    assert sent <= buffer_bytes + 16
    assert taken <= plan.transfer_bytes - min(taken, sent) <= taken + 32 * len(offload._chunks)
    for _ in range(3):
        plan.run([0.125, 0.7])
        assert plan.under_way
        for views, weight in zip(expected, (0.125, 0.7), strict=True):
            for i, parameter in enumerate(live):
                views[i] = loop(real_view(views[i]), real_view(parameter), weight)
        for parameter in live:
            device.begin("train", lambda parameter=parameter: parameter.mul_(1.5))
        assert plan.settle() is None
        for ours, theirs in zip(seeds, expected, strict=True):
            for got, want in zip(ours, theirs, strict=True):
                assert torch.equal(real_view(got), want), got.shape
    assert plan.take_skipped() == 6
    assert plan.nonfinite() == [3, 6]


def test_what_an_update_begins(device: Accelerator) -> None:
    """Per chunk two copies and an event, however many tensors are in it."""
    live = [torch.randn(100) for _ in range(3000)]
    plan = LerpPlan([[t.clone() for t in live]], live, guard=True, buffer_bytes=400_000)
    device.take_seen()
    plan.run([0.5])
    begin = [("record", "main"), ("wait", "side")]
    chunk = [("copy", "side"), ("copy", "side"), ("record", "side")]
    end = [("record", "side"), ("wait", "main")]
    assert device.take_seen() == [*begin, *3 * chunk, *end]
    assert plan.settle() is None
    assert device.take_seen() == [], "the host waits for its thread alone"


def test_the_side_waits_for_the_step_before_it_copies(device: Accelerator) -> None:
    live = [torch.zeros(10)]
    plan = LerpPlan([[torch.zeros(10)]], live, guard=True)
    device.seen.clear()
    plan.run([0.5])
    (_, _, stepped), (_, _, waited), *_, (_, _, copied), (_, _, followed) = device.seen
    assert [what for what, *_ in device.seen][2:5] == ["copy", "copy", "record"]
    assert stepped is waited and copied is followed
    plan.settle()


@pytest.fixture
def ema(device: Accelerator) -> ShardedEMA:
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    return ShardedEMA(model, 0.5)


def train(device: Accelerator, ema: ShardedEMA, value: float) -> None:
    """A step that sets all weights, and an update behind which the thread is held."""
    (weight,) = ema._model.weights()
    device.begin("train", lambda: weight.fill_(value))
    device.let_go.clear()
    ema.update()


def average(ema: ShardedEMA) -> float:
    return float(ema._average.shadow._views["ema"][0][0, 0])


LOOKS: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "swap": lambda ema, path: ema.swap().__enter__(),
    "copy_to": lambda ema, path: ema.copy_to(),
    "save": lambda ema, path: ema.save(path / "c", step=1),
    "save asynchronously": lambda ema, path: ema.save(path / "c", step=1, asynchronous=True),
    "state_dict": lambda ema, path: ema.state_dict(),
    "metrics": lambda ema, path: ema.metrics(),
    "copy": lambda ema, path: copy.deepcopy(ema),
    "close": lambda ema, path: ema.close(),
}


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
@pytest.mark.parametrize("look", LOOKS)
def test_whatever_looks_at_the_average_waits(
    device: Accelerator, ema: ShardedEMA, look: str, tmp_path: Path
) -> None:
    train(device, ema, 8.0)
    assert average(ema) == 0.0 and ema._average.shadow._plan.under_way  # type: ignore[union-attr]
    LOOKS[look](ema, tmp_path)
    assert not ema._average.shadow._plan.under_way  # type: ignore[union-attr]
    assert average(ema) == 4.0


def test_updates_follow_each_other(device: Accelerator, ema: ShardedEMA) -> None:
    for value in (8.0, 16.0, 32.0):
        train(device, ema, value)
    (weight,) = ema._model.weights()
    device.begin("train", lambda: weight.fill_(float("nan")))
    assert ema.metrics()["ema/nonfinite_elements"] == 0
    assert average(ema) == 21.0
    ema.close()


def test_other_memory_meanwhile(device: Accelerator, ema: ShardedEMA) -> None:
    train(device, ema, 8.0)
    (weight,) = ema._model.weights()
    weight.data = torch.full((1, 3), 2.0)
    device.let_go.set()
    ema.update()
    assert ema.state_dict()["ema.weight"].tolist() == [[3.0] * 3]
    ema.close()


def test_a_load_comes_after_an_update(device: Accelerator, ema: ShardedEMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "c", step=0)
    train(device, ema, 8.0)
    ema.load(tmp_path / "c")
    assert average(ema) == 0.0 and ema.num_updates == 0
    ema.close()


def test_only_an_update_that_is_due_waits(device: Accelerator) -> None:
    ema = ShardedEMA(nn.Linear(3, 1), 0.5, update_every=3)
    plan = ema._average.shadow._plan
    assert plan is not None
    for _ in range(3):
        ema.update()
    device.let_go.clear()
    for _ in range(2):
        ema.update()
        assert plan.under_way and not device.let_go.is_set()
    ema.update()
    assert device.let_go.is_set()
    ema.close()


# ---------------------------------------------------------------------- failures


def fail(ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ValueError("row 3 of the table is none")

    with monkeypatch.context() as patch:
        (offload,) = ema._average.shadow._plan._offloads  # type: ignore[union-attr]
        patch.setattr(type(offload._chunks[0].update), "run", broken)
        under_way = offload._thread.submit(offload._average, [0.5], [torch.cpu.Event()])
        under_way.exception()
    offload._under_way = under_way


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
def test_an_interrupted_wait_is_made_up_for(
    device: Accelerator, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Future[None], timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    train(device, ema, 8.0)
    with monkeypatch.context() as patch:
        patch.setattr(Future, "exception", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ema.metrics()
    device.let_go.set()
    assert ema.state_dict()["ema.weight"].tolist() == [[4.0] * 3]
    ema.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_weights_may_change_once_they_are_copied(device: Accelerator, overlap: bool) -> None:
    """At once, as far as the host sees; or from the hook before the next step on."""
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = ShardedEMA(model, 0.5, overlap=overlap)
    ema.attach(optimizer)
    assert model.weight.data_ptr() in device.held, "given back meanwhile, it is read to the end"
    for turn in range(2):
        model(torch.ones(1, 3)).sum().backward()
        device.take_seen()
        optimizer.step()
        waits = [what for what in device.take_seen() if what == ("wait", "main")]
        assert len(waits) == (turn if overlap else 1)
    ema.close()


FAILS = {name: LOOKS[name] for name in ("copy_to", "save", "state_dict", "metrics", "close")}


@pytest.mark.parametrize("look", [*FAILS, "update", "swap"])
def test_a_failure_is_told_where_it_is_waited_for(
    device: Accelerator,
    ema: ShardedEMA,
    look: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ema.update()
    fail(ema, monkeypatch)
    told = r"update after step 1 has failed behind its call \(ValueError: row 3 of the table"
    with pytest.raises(StateError, match=told):
        {**LOOKS, "update": lambda ema, path: ema.update()}[look](ema, tmp_path)
    if look == "close":
        ema.close()
        return
    with pytest.raises(StateError, match=told):
        ema.update()
    assert ema.num_updates == 1
    ema.reseed()
    ema.update()
    ema.close()


def test_a_load_mends_what_has_failed(
    device: Accelerator, ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema.save(tmp_path / "c", step=0)
    ema.update()
    fail(ema, monkeypatch)
    ema.load(tmp_path / "c")
    ema.update()
    assert average(ema) == 0.0
    ema.close()


def test_a_buffer_of_nothing_is_refused() -> None:
    for size in (0, 1000, 1.5e8, True):
        with pytest.raises(ConfigError, match="offload_buffer must be at least 1,048,576 bytes"):
            ShardedEMA(nn.Linear(1, 1), offload_buffer=size)  # type: ignore[arg-type]


def test_what_it_takes_of_memory(device: Accelerator) -> None:
    ema = ShardedEMA(nn.Linear(1 << 10, 1 << 9, bias=False), offload_buffer=1 << 20)
    assert ema.memory["transfer"] == (1 << 21) + (1 << 20)
    ema.close()
