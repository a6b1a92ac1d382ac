"""The update of an average beside the next step of a GPU: what waits for what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_ema import ShardedEMA
from sharded_ema.averaging.kernels import launches
from sharded_ema.errors import ConfigError
from tests.helpers.accelerator import Accelerator, stand_in

# An update beside the step, and what comes before whatever it might disturb.
BESIDE = [("record", "main"), ("wait", "side"), ("launch", "side"), ("record", "side")]
FENCE = [("wait", "main")]
STEP = ("step", "main")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """A GPU whose kernel notes that it was started."""
    device = stand_in(monkeypatch, offloads=False)

    def launch(table: Tensor, *args: Any, **options: Any) -> None:
        if table[:, 1].any():  # else it is tried out
            device.begin("launch", lambda: None)

    monkeypatch.setattr(launches, "DEVICES", {"cpu"})
    monkeypatch.setattr(launches, "launch", launch)
    monkeypatch.setattr(launches, "triton_module", lambda: SimpleNamespace(FAILURES=()))
    return device


class Training:
    """A model whose optimizer notes when it writes."""

    class SGD(torch.optim.SGD):
        device: Accelerator

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            self.device.note("step", self.device.main)

    def __init__(
        self, device: Accelerator, *, norm: bool = False, double: bool = False, **settings: Any
    ) -> None:
        self.device = device
        self.model = nn.Sequential(nn.Linear(3, 2), *[nn.BatchNorm1d(2)] * norm)
        if double:
            self.model[0].bias.data = self.model[0].bias.data.double()
        self.optimizer = self.SGD(self.model.parameters(), 0.1)
        self.optimizer.device = device
        self.ema = ShardedEMA(self.model, 0.5, **settings)
        device.take_seen()

    def step(self) -> None:
        self.model(torch.ones(2, 3)).sum().backward()
        self.optimizer.step()


def test_an_update_goes_beside_until_the_next_step(device: Accelerator) -> None:
    run = Training(device, overlap=True)
    run.ema.attach(run.optimizer)
    device.take_seen()
    run.step()
    assert device.take_seen() == [STEP, *BESIDE]
    run.step()
    # Before the optimizer writes, and before the next update of the same shadow.
    assert device.take_seen() == [*FENCE, STEP, *BESIDE]
    run.ema.close()
    assert device.take_seen()[:1] == FENCE


def test_what_is_waited_for_is_the_launch(device: Accelerator) -> None:
    run = Training(device, overlap=True)
    run.ema.attach(run.optimizer)
    run.step()
    device.seen.clear()
    run.step()
    (_, _, fence), _, (_, _, stepped), (_, _, waited), _, (_, _, launched) = device.seen
    assert stepped is waited and fence is not None
    assert fence.stream.name == "side" and fence is not launched
    device.seen.clear()
    run.ema.state_dict()
    assert [event for what, _, event in device.seen if what == "wait"] == [launched]
    run.ema.close()


@pytest.mark.parametrize("overlap", [False, "auto"])
def test_without_hooks_the_update_is_in_the_order_of_the_program(
    device: Accelerator, overlap: bool | str
) -> None:
    """As after optimizers that step in the backward: nobody would say when weights change."""
    run = Training(device, overlap=overlap)
    run.ema.update()
    assert device.take_seen() == [("launch", "main")]
    run.ema.attach(run.optimizer)
    device.take_seen()
    run.step()
    assert device.take_seen() == [STEP, *(BESIDE if overlap else [("launch", "main")])]
    run.ema.close()


def test_averaged_buffers_are_read_before_a_forward_changes_them(device: Accelerator) -> None:
    run = Training(device, norm=True, overlap="auto", buffers="average")
    run.ema.attach(run.optimizer)
    device.take_seen()
    run.step()
    assert [each for each in device.take_seen() if each[0] != "host waits"][:1] == [STEP]
    assert not run.ema._average.shadow._plan.under_way  # type: ignore[union-attr]
    run.ema.close()


def test_what_cannot_overlap_is_refused_where_it_was_asked_for(device: Accelerator) -> None:
    run = Training(device, overlap=True)
    with pytest.raises(ConfigError, match="asked for and no torch\\.optim\\.Optim"):
        run.ema.update()
    run = Training(device, norm=True, overlap=True, buffers="average")
    run.ema.attach(run.optimizer)
    with pytest.raises(ConfigError, match="overlap=True was asked for and buffers are averaged"):
        run.step()
    assert run.ema.num_updates == 0


def enter(ema: ShardedEMA) -> None:
    with ema.swap():
        pass


READS: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "swap": lambda ema, path: enter(ema),
    "copy_to": lambda ema, path: ema.copy_to(),
    "save": lambda ema, path: ema.save(path / "c", step=1),
    "load": lambda ema, path: ema.load(path / "before"),
    "reseed": lambda ema, path: ema.reseed(),
    "state_dict": lambda ema, path: ema.state_dict(),
    "metrics": lambda ema, path: ema.metrics(),
    "update": lambda ema, path: ema.update(),
}


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
@pytest.mark.parametrize("read", READS)
def test_whatever_reads_the_average_or_writes_weights_comes_after(
    device: Accelerator, read: str, tmp_path: Path
) -> None:
    run = Training(device, overlap=True)
    run.ema.save(tmp_path / "before", step=0)
    run.ema.attach(run.optimizer)
    run.step()
    device.take_seen()
    READS[read](run.ema, tmp_path)
    seen = device.take_seen()
    assert [each for each in seen if each[0] != "host waits"][:1] == FENCE
    run.ema.close()


def test_memory_that_is_read_or_written_stays(device: Accelerator) -> None:
    """Weights that move meanwhile, and an average that nobody holds any more."""
    run = Training(device, double=True, overlap=True)
    run.ema.attach(run.optimizer)
    assert not device.held
    run.optimizer.step()  # two launches: one for each dtype of shadows
    flat = run.ema._average.shadow._memory["ema"]
    assert len(flat) == 2
    assert set(map(Tensor.data_ptr, [*run.model.parameters(), *flat])) < device.held
    run.ema.close()


def test_another_stream_may_look_meanwhile(device: Accelerator) -> None:
    """Then the one of the training has still to wait before it writes."""
    run = Training(device, overlap=True)
    run.ema.attach(run.optimizer)
    run.step()
    device.take_seen()
    with device.stream(device.Stream(torch.device("cpu"))):
        run.ema.state_dict()
    assert device.take_seen()[:1] == [("wait", "side")]
    run.step()
    assert device.take_seen() == [*FENCE, STEP, *BESIDE]
    run.ema.close()


def test_it_is_asked_for_in_three_ways() -> None:
    with pytest.raises(ConfigError, match="overlap must be 'auto', True or False, got 'yes'"):
        ShardedEMA(nn.Linear(1, 1), overlap="yes")
