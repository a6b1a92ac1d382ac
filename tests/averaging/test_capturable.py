"""Updates that are part of a recorded graph: each replay is one, and the counts agree."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_ema import ShardedEMA, Warmup
from sharded_ema.averaging import ahead
from sharded_ema.averaging.schedules import Power, Schedule, as_profiles
from sharded_ema.errors import ConfigError, EMAWarning, StateError, SwapError
from tests.helpers.graph import Device, Graph, stand_in

WARMUP = 3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return stand_in(monkeypatch)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of the real size take a moment each."""
    monkeypatch.setattr(ahead, "STEPS_AHEAD", 64)


class Training:
    """A model whose optimizer's step is recorded, with gradients that lie where they lie."""

    def __init__(self, schedule: Any = "warmup:0.9999", **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(5, 3), nn.Linear(3, 2).bfloat16(), nn.Linear(2, 2).double()
        )
        self.weights = list(self.model.parameters())
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self.optimizer = torch.optim.SGD(self.weights, 0.1, foreach=False)
        self.plain = PlainLoop(self.weights, schedule, **settings)
        self.ema = ShardedEMA(self.model, schedule, capturable=True, **settings)
        self.graph = Graph()
        self.steps = 0

    def fill(self, *, bad: bool = False) -> None:
        """Gradients of the next step."""
        self.steps += 1
        torch.manual_seed(self.steps)
        for weight in self.weights:
            assert weight.grad is not None
            weight.grad.copy_(torch.randn(weight.shape))
        if bad:
            self.weights[0].data[1, 1] = float("nan")

    def step(self) -> None:
        """One that is not recorded."""
        self.fill()
        self.optimizer.step()
        if self.ema._model.steps is None:
            self.ema.update()
        self.plain.update(self.weights)

    def record(self, device: Device) -> None:
        before = [t.clone() for t in self.weights]
        with device.recording() as self.graph:
            self.optimizer.step()
            if self.ema._model.steps is None:
                self.ema.update()
        assert all(map(torch.equal, before, self.weights))

    def replay(self, times: int = 1, *, bad: bool = False) -> None:
        for _ in range(times):
            self.fill(bad=bad)
            self.graph.replay()
            self.plain.update(self.weights)

    def assert_right(self) -> None:
        """The average, and all that is said of it."""
        assert self.ema.num_updates == self.plain.num_updates
        assert self.ema.decay == self.plain.decays
        numbers = self.ema.metrics()
        assert numbers["ema/applied_steps"] == self.plain.steps
        for name, expected in self.plain.averages.items():
            got = [self.ema.state_dict()[f"{name}.{key}"] for key in self.ema.names]
            assert all(map(torch.equal, got, expected)), name
            assert numbers[f"ema/seed_weight/{name}"] == self.plain.left[name]


class PlainLoop:
    """The average as one writes it down."""

    def __init__(
        self, weights: Sequence[Tensor], schedule: Any, *, update_every: int = 1,
        start_step: int = 0, decay_per: str = "step", nonfinite: str = "skip", **_: Any,
    ) -> None:  # fmt: skip
        self.schedules: dict[str, Schedule] = as_profiles(schedule)
        self.every, self.start, self.per = update_every, start_step, decay_per
        self.guard = nonfinite == "skip"
        self.steps, self.num_updates, self.begun = 0, 0, start_step == 0
        self.averages = {name: [widened(w).clone() for w in weights] for name in self.schedules}
        self.left = dict.fromkeys(self.schedules, 1.0)
        self.window = dict.fromkeys(self.schedules, 1.0)

    @property
    def decays(self) -> dict[str, float]:
        return {name: s.decay(max(1, self.num_updates)) for name, s in self.schedules.items()}

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        self.steps += 1
        self.num_updates += self.begun
        due = self.begun and self.num_updates % self.every == 0
        for name, averages in self.averages.items():
            if self.begun:
                now = self.decays[name]
                self.window[name] = self.window[name] * now if self.per == "step" else now
            if not due and self.begun:
                continue
            decay = self.window[name] if self.begun else 0.0
            self.window[name] = 1.0
            self.left[name] = self.left[name] * decay if self.begun else 1.0
            for average, weight in zip(averages, weights, strict=True):
                value = widened(weight)
                new = value.clone() if decay == 0.0 else torch.lerp(average, value, 1.0 - decay)
                average.copy_(torch.where(value.isfinite(), new, average) if self.guard else new)
        self.begun |= self.steps >= self.start


def widened(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


@pytest.mark.parametrize("hooks", [False, True], ids=["update", "attached"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": 0.5},
        {"schedule": {"a": Warmup(0.9999), "b": Power(sigma_rel=0.1), "c": 0.9}},
        {"update_every": 3},
        {"update_every": 3, "decay_per": "update"},
        {"start_step": 6},
        {"start_step": 2, "update_every": 2},
        {"nonfinite": "allow"},
    ],
    ids=str,
)
def test_each_replay_is_an_update(device: Device, settings: dict[str, Any], hooks: bool) -> None:
    run = Training(**settings)
    if hooks:
        run.ema.attach(run.optimizer)
    for _ in range(WARMUP):
        run.step()
    run.assert_right()
    run.record(device)
    run.assert_right()  # nothing was done
    for times in (1, 2, 5):
        run.replay(times)
        run.assert_right()
    run.step()  # and one outside
    run.replay()
    run.assert_right()
    run.ema.close()


@pytest.mark.parametrize("profiles", [1, 3])
def test_it_is_one_launch_for_a_dtype_of_shadows_and_the_count(
    device: Device, profiles: int
) -> None:
    run = Training({f"p{k}": 0.9 for k in range(profiles)})
    run.step()
    with device.recording() as graph:
        run.ema.update()
    assert graph.launches == 2
    assert graph.operators == ["add_"]
    run.ema.close()


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
def test_nothing_finite_is_lost_and_what_was_skipped_is_counted(device: Device) -> None:
    run = Training()
    run.step()
    run.record(device)
    run.replay(2)
    run.replay(bad=True)
    run.assert_right()
    assert run.ema.metrics()["ema/nonfinite_elements"] == 1
    run.replay()  # counts where it counted before
    assert run.ema.metrics()["ema/nonfinite_elements"] == 2
    run.ema.close()


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
def test_what_a_graph_counts_in_was_there_before(device: Device) -> None:
    """Also where weights moved after the warm-up and no update has seen it yet."""
    run = Training()
    run.step()
    for weight in run.weights:
        weight.data = weight.data.clone()
    run.ema.metrics()
    with device.recording() as graph:
        run.ema.update()
    run.weights[0].data[1, 1] = float("nan")
    for _ in range(3):
        graph.replay()
    assert run.ema.metrics()["ema/nonfinite_elements"] == 3
    run.ema.close()


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
def test_a_start_that_lies_ahead_of_a_loaded_average(device: Device, tmp_path: Path) -> None:
    run = Training(0.9)
    run.step()
    run.ema.save(tmp_path / "c", step=1)
    later = Training(0.9, start_step=4)
    later.step()
    later.record(device)
    later.ema.load(tmp_path / "c")
    later.plain.steps = 1
    later.replay(4)
    later.assert_right()
    run.ema.close()
    later.ema.close()


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
def test_a_loaded_average_goes_on_in_the_graph(device: Device, tmp_path: Path) -> None:
    run = Training()
    run.step()
    run.record(device)
    run.replay(4)
    run.ema.save(tmp_path / "c", step=5)
    kept = [t.clone() for t in run.plain.averages["ema"]]
    run.replay(3)
    assert run.ema.load(tmp_path / "c") == 5
    run.plain.averages["ema"], run.plain.num_updates, run.plain.steps = kept, 5, 5
    run.plain.left["ema"] = run.ema.metrics()["ema/seed_weight/ema"]
    run.assert_right()
    run.replay(2)
    run.assert_right()
    other = ShardedEMA(Training().model, capturable=True)
    other.load(tmp_path / "c")
    assert other.num_updates == 5
    run.ema.close()
    other.close()


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
def test_a_loaded_average_heals_in_the_graph(device: Device, tmp_path: Path) -> None:
    run = Training()
    run.step()
    run.record(device)
    run.ema.state_dict()["ema.0.weight"][0, 0] = float("inf")
    run.ema.save(tmp_path / "c", step=1)
    run.ema.load(tmp_path / "c")
    run.replay()
    run.plain.averages["ema"][0][0, 0] = run.weights[0][0, 0].detach()
    run.assert_right()
    run.ema.close()


def test_a_copy_counts_for_itself(device: Device) -> None:
    run = Training()
    run.step()
    run.record(device)
    run.replay(2)
    copied = copy.deepcopy(run.ema)
    run.replay(2)
    assert copied.num_updates == 3
    copied.update()
    assert copied.num_updates == 4
    run.assert_right()
    run.ema.close()
    copied.close()


def test_a_new_start_counts_from_there(device: Device) -> None:
    run = Training()
    run.step()
    run.record(device)
    run.replay(4)
    run.ema.reseed()
    run.plain.averages["ema"] = [widened(w).clone() for w in run.weights]
    run.plain.num_updates, run.plain.left["ema"] = 0, 1.0
    run.assert_right()
    run.replay(2)
    run.assert_right()
    run.ema.close()


def test_after_a_new_start_a_step_outside_goes_on_with_what_was_replayed(device: Device) -> None:
    run = Training()
    run.step()
    run.record(device)
    run.ema.reseed()
    run.plain.averages["ema"] = [widened(w).clone() for w in run.weights]
    run.plain.num_updates, run.plain.left["ema"] = 0, 1.0
    run.replay(3)
    run.step()
    assert run.ema.num_updates == 4
    run.assert_right()
    run.ema.close()


def test_made_in_inference_mode_it_counts(device: Device) -> None:
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        ema = ShardedEMA(model, 0.5, capturable=True)
    with device.recording() as graph:
        ema.update()
    graph.replay()
    assert ema.num_updates == 1
    ema.close()


def test_a_teacher_that_is_the_weights_is_not_recorded(device: Device) -> None:
    """Replayed, its forward would have made the average of them each time."""
    model, batch = nn.Linear(2, 2), torch.ones(1, 2)
    ema = ShardedEMA(model, 0.5, capturable=True, start_step=2)
    teacher = ema.module()
    ema.update()
    with pytest.raises(StateError, match="before start_step"), device.recording():
        teacher(batch)
    ema.update()
    with torch.no_grad():
        model.weight.add_(1.0)
    before = ema.state_dict()["ema.weight"].clone()
    with device.recording() as graph:
        teacher(batch)
    graph.replay()
    assert torch.equal(ema.state_dict()["ema.weight"], before)
    ema.close()


# ---------------------------------------------------------------------- the table's end


@pytest.mark.parametrize("settings", [{}, {"update_every": 3}, {"start_step": 20}], ids=str)
def test_looking_brings_further_decays(device: Device, settings: dict[str, Any]) -> None:
    run = Training({"a": Warmup(0.9999), "b": Power(sigma_rel=0.1)}, **settings)
    run.step()
    run.record(device)
    for _ in range(6):
        run.replay(ahead.STEPS_AHEAD - 33)
        run.assert_right()
    assert run.ema.num_updates > 2 * ahead.STEPS_AHEAD
    run.ema.close()


@pytest.mark.parametrize("settings", [{}, {"update_every": 3}], ids=str)
def test_past_the_end_the_last_decays_go_on_and_it_is_said(
    device: Device, settings: dict[str, Any]
) -> None:
    run = Training(Power(sigma_rel=0.1), **settings)
    run.step()
    run.record(device)
    run.replay(ahead.STEPS_AHEAD + 6)
    with pytest.warns(EMAWarning, match=r"past the 64 steps .* up to 71 had the decay of step 64"):
        assert run.ema.num_updates == ahead.STEPS_AHEAD + 7
    # Within a table that begins there anew, all is right again.
    left = run.ema.metrics()["ema/seed_weight/ema"]
    averages = [run.ema.state_dict()[f"ema.{key}"].clone() for key in run.ema.names]
    run.plain.averages["ema"], run.plain.left["ema"] = averages, left
    run.replay(9)
    run.assert_right()
    run.ema.close()


def test_past_the_end_a_constant_decay_is_right(device: Device) -> None:
    run = Training(0.9)
    run.step()
    run.record(device)
    run.replay(3 * ahead.STEPS_AHEAD)
    run.assert_right()
    run.ema.close()


# ---------------------------------------------------------------------- memory


def test_a_graph_keeps_what_it_reads(device: Device) -> None:
    """Weights may move to other memory; the graph still reads what it has recorded."""
    run = Training(0.5)
    run.step()
    with device.recording() as graph:
        run.ema.update()
    values = [widened(w).clone() for w in run.weights]
    for weight in run.weights:
        weight.data = torch.zeros_like(weight)
    run.ema.update()
    run.plain.update(run.weights)
    gc.collect()
    # What was given back would be found here.
    rubbish = [torch.full_like(w, float("nan")) for w in run.weights for _ in range(100)]
    run.assert_right()
    graph.replay()
    run.plain.update(values)
    run.assert_right()
    assert run.ema.metrics()["ema/nonfinite_elements"] == 0
    del rubbish
    run.ema.close()


def test_what_cannot_be_noted_while_recording_is_refused(device: Device) -> None:
    run = Training()
    run.step()
    run.weights[0].data = run.weights[0].data.clone()
    with (
        pytest.raises(StateError, match="other memory than at the last update"),
        device.recording(),
    ):
        run.ema.update()
    run.ema.update()
    assert run.ema.num_updates == 2
    run.ema.close()


def test_a_first_step_is_not_recorded(device: Device) -> None:
    run = Training()
    with (
        pytest.raises(StateError, match="none was taken outside of one"),
        device.recording(),
    ):
        run.optimizer.step()
    run.step()
    run.record(device)
    run.ema.close()


def test_a_scaler_inside_is_refused(device: Device) -> None:
    class Fused(torch.optim.SGD):
        """As GradScaler leaves a fused one."""

        found_inf = torch.zeros(())

        def step(self, closure: Any = None) -> None:
            pass

    model = nn.Linear(2, 2)
    optimizer = Fused(model.parameters(), 0.1)
    ema = ShardedEMA(model, capturable=True)
    ema.attach(optimizer)
    optimizer.step()
    with pytest.raises(StateError, match="a GradScaler steps the optimizer"), device.recording():
        optimizer.step()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert ema.num_updates == 1 and ema.metrics()["ema/skipped_steps"] == 1
    ema.close()


def test_unasked_for_it_is_refused(device: Device) -> None:
    ema = ShardedEMA(Training().model)
    with (
        pytest.raises(StateError, match="Make the ShardedEMA with capturable=True"),
        device.recording(),
    ):
        ema.update()
    ema.update()
    assert ema.num_updates == 1
    ema.close()


def test_an_average_that_is_recorded_stays_where_it_is(device: Device) -> None:
    run = Training()
    run.step()
    run.record(device)
    with pytest.raises(StateError, match="a graph has recorded updates of the one that it has"):
        run.ema.module()
    run.replay()
    run.assert_right()
    run.ema.close()


@pytest.mark.filterwarnings("ignore::sharded_ema.errors.EMAWarning")
def test_a_replay_within_a_swap_is_told_of(device: Device) -> None:
    run = Training(0.5)
    run.step()
    run.record(device)
    before = [w.detach().clone() for w in run.weights]
    with pytest.raises(SwapError, match="replayed within swap"), run.ema.swap():
        run.graph.replay()
    assert all(map(torch.equal, before, run.weights))
    with pytest.raises(StateError, match="replayed within swap"):
        run.ema.update()
    run.ema.reseed()
    with pytest.raises(KeyboardInterrupt), run.ema.swap():
        run.graph.replay()
        raise KeyboardInterrupt
    with pytest.raises(StateError, match="replayed within swap"), run.ema.swap():
        pass
    run.ema.close()


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"overlap": True}, "does not go with overlap=True"),
        ({"nonfinite": "raise"}, "does not go with nonfinite='raise'"),
        ({"start_step": 63}, "in which start_step=63"),
        ({"update_every": 33}, "two updates of update_every=33"),
        ({"impl": "foreach"}, "6 parameters are not of that kind"),
        ({"shadow_dtype": torch.bfloat16, "schedule": 0.9}, "6 parameters are not of that kind"),
        ({"schedule": {f"p{k}": 0.9 for k in range(9)}}, "at most 8 profiles"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(
    device: Device, settings: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        Training(**settings)


def test_parameters_that_no_launch_takes_are_named(device: Device) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(8, 8)[::2, ::2])
    with pytest.raises(ConfigError, match=r"among them \['1.weight'\]"):
        ShardedEMA(model, capturable=True)
    ema = ShardedEMA(model, capturable=True, exclude="1.weight")
    ema.close()


def test_a_kernel_that_fails_is_an_error(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("sharded_ema.averaging.kernels.launches.launch", broken)
    with pytest.raises(ConfigError, match="capturable=True was asked for and fails on cpu: no ker"):
        ShardedEMA(nn.Linear(2, 2), capturable=True)


def test_on_the_cpu_there_are_no_graphs() -> None:
    with pytest.raises(ConfigError, match="one CUDA device, and weight is on cpu"):
        ShardedEMA(nn.Linear(2, 2), capturable=True)
    with pytest.raises(ConfigError, match="capturable must be True or False, got 'auto'"):
        ShardedEMA(nn.Linear(2, 2), capturable="auto")  # type: ignore[arg-type]
