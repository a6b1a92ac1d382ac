"""ShardedEMA in one process: what is averaged, under which names, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor

from sharded_ema import HalfLife, ShardedEMA, inspect
from sharded_ema.errors import (
    BindError,
    CheckpointExistsError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    ConfigError,
    EMAWarning,
    NonFiniteError,
    StateError,
    SwapError,
    UnsupportedLayoutError,
)
from tests.helpers.layouts import as_float, assert_equal, build, reference_step


def averages(ema: ShardedEMA, profile: str = "ema") -> dict[str, Tensor]:
    state = ema.state_dict()
    start = f"{profile}."
    return {k.removeprefix(start): v.clone() for k, v in state.items() if k.startswith(start)}


@pytest.mark.parametrize("mode", ["plain"])
def test_equals_the_plain_loop(mode: str) -> None:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.99)
    ema.attach(run.optimizer)
    expected = as_float(run.gather())
    for index in range(50):
        run.step(index)
        reference_step(expected, run.gather(), 1 - 0.99)
    assert_equal(averages(ema), expected)
    before, out = run.gather(), run.evaluate()
    with ema.swap():
        assert_equal(run.gather(), expected)
        assert not torch.equal(run.evaluate(), out)
    assert_equal(run.gather(), before)
    ema.copy_to()
    assert_equal(run.gather(), expected)


def test_names_are_those_of_the_bare_model() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 3)  # a user's own name, no wrapper
            self.head = nn.Linear(3, 3, bias=False)
            self.head.weight = self.module.weight
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

    bare = Inner()
    names = set(bare.state_dict())
    wrapped = Inner()
    wrapped.module = checkpoint_wrapper(wrapped.module)  # type: ignore[assignment]
    compiled = torch.compile(nn.Sequential(torch.compile(wrapped)))
    for model, prefix in ((bare, ""), (compiled, "0.")):
        ema = ShardedEMA(model, 0.9)  # type: ignore[arg-type]
        state = ema.state_dict()
        stored = {key.partition(".")[2] for key in state if key != "_meta"}
        assert stored == {prefix + n for n in names - {"head.weight"}}
        assert ema.names == [f"{prefix}module.weight", f"{prefix}module.bias"]
        assert f"_frozen.{prefix}frozen" in state and f"_buffers.{prefix}steps" in state


def test_a_compiled_and_a_checkpointed_model_train_and_swap() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 1))
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(compiled, 0.5)  # type: ignore[arg-type]
    ema.attach(optimizer)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        compiled(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            expected[name].lerp_(parameter.detach(), 0.5)
    with ema.swap():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name])


def test_patterns_and_frozen(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.requires_grad_(False)  # type: ignore[union-attr]
    assert ShardedEMA(model, include="*.weight").names == ["0.weight"]
    ema = ShardedEMA(model, exclude=["0.*"], frozen="skip")
    assert ema.names == ["1.bias"]
    assert set(ema.state_dict()) == {"ema.1.bias", "_meta"}
    ema.save(tmp_path / "x", step=1)
    with pytest.raises(ConfigError, match=r"pattern '2\.\*' matches no parameter"):
        ShardedEMA(model, include="2.*")
    with pytest.raises(BindError, match="no parameter to average"):
        ShardedEMA(model, exclude="*")


def test_buffers() -> None:
    model = nn.BatchNorm1d(3)
    model.running_mean = torch.zeros(3)
    for policy in ("copy", "average", "ignore"):
        ema = ShardedEMA(model, 0.5, buffers=policy)
        model.running_mean = torch.ones(3)  # replaced, not written into
        ema.update()
        state = ema.state_dict()
        if policy == "average":
            assert state["ema.running_mean"].tolist() == [0.5] * 3
            assert "_buffers.num_batches_tracked" in state
            with ema.swap():
                assert model.running_mean.tolist() == [0.5] * 3
            assert model.running_mean.tolist() == [1.0] * 3
        else:
            assert ("_buffers.running_mean" in state) == (policy == "copy")
            assert "ema.running_mean" not in state
        model.running_mean = torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"schedule": 1.5}, ConfigError, r"decay must lie in \[0, 1\]"),
        ({"schedule": "parabola:3"}, ConfigError, "unknown schedule"),
        ({"schedule": {}}, ConfigError, "at least one profile"),
        ({"schedule": {"_x": 0.9}}, ConfigError, "profile name"),
        ({"schedule": {"a.b": 0.9}}, ConfigError, "profile name"),
        ({"update_every": 0}, ConfigError, "update_every"),
        ({"start_step": -1}, ConfigError, "start_step"),
        ({"buffers": "all"}, ConfigError, "buffers must be one of"),
        ({"frozen": "drop"}, ConfigError, "frozen must be one of"),
        ({"nonfinite": "ignore"}, ConfigError, "nonfinite must be one of"),
        ({"impl": "cuda"}, ConfigError, "registered"),
        ({"shadow_dtype": torch.bfloat16}, ConfigError, "does not move"),
        ({"shadow_dtype": torch.int32}, ConfigError, "floating"),
        ({"total_steps": 0}, ConfigError, "total_steps"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ShardedEMA(nn.Linear(2, 2), **arguments)


def test_models_that_cannot_be_averaged() -> None:
    with pytest.raises(BindError, match="meta device"):
        ShardedEMA(nn.Linear(2, 2, device="meta"))
    with pytest.raises(BindError, match=r"weight has shape \(0,\)"):
        linear = nn.Linear(2, 2)
        linear.weight = nn.Parameter(torch.empty(0))
        ShardedEMA(linear)
    with pytest.raises(BindError, match="no parameter to average"):
        ShardedEMA(nn.ReLU())
    with pytest.raises(BindError, match="must be a torch"):
        ShardedEMA(torch.ones(2))  # type: ignore[arg-type]

    class DeepSpeedEngine(nn.Module):
        optimizer = None

        def zero_optimization_stage(self) -> int:
            return 0

    # Whether DeepSpeed's version or the missing optimizer is named: it depends on what is imported.
    with pytest.raises(UnsupportedLayoutError, match=r"DeepSpeed 0 |is a NoneType"):
        ShardedEMA(DeepSpeedEngine())


def test_what_a_swap_refuses() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.9)
    weight = model.weight.detach().clone()
    for call in (ema.update, ema.copy_to, ema.close, lambda: ema.load("x"),
                 lambda: ema.load_state_dict({}), lambda: ema.swap().__enter__(),
                 lambda: ema.metrics(distance=True)):  # fmt: skip
        with ema.swap(), pytest.raises(SwapError, match="stands in for the parameters"):
            call()
        assert torch.equal(model.weight, weight)
    several = ShardedEMA(model, {"a": 0.9, "b": 0.99})
    with pytest.raises(ConfigError, match=r"not one of \['a', 'b'\]"), several.swap():
        pass
    with several.swap("b"):
        pass


def test_replaced_parameters_are_refused_and_moved_ones_followed() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.5)
    model.double()
    ema.update()
    with ema.swap():
        assert model.weight.dtype is torch.float64
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(BindError, match="parameter weight was replaced"), ema.swap():
        pass
    with pytest.raises(BindError, match="parameter weight was replaced"):
        ema.metrics()


def test_before_start_step_the_average_is_the_parameters() -> None:
    run = build("plain")
    ema = ShardedEMA(run.target, 0.9, start_step=3)
    for index in range(3):
        run.step(index)
        with ema.swap():
            pass
        assert_equal(averages(ema), as_float(run.gather()))
        assert ema.num_updates == 0
        ema.update()
    assert_equal(averages(ema), as_float(run.gather()))
    seed = as_float(run.gather())
    run.step(3)
    ema.update()
    reference_step(seed, run.gather(), 1 - 0.9)
    assert_equal(averages(ema), seed)
    assert ema.num_updates == 1


def test_nonfinite_skip() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight[0, 0] = math.nan
        model.weight[1, 1] += 1
    ema.update()
    state = ema.state_dict()["ema.weight"]
    assert state[0, 0] == before[0, 0] and state[1, 1] == before[1, 1] + 0.5
    with pytest.warns(EMAWarning, match="1 times a NaN or Inf"):
        assert ema.metrics()["ema/nonfinite_elements"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.metrics()


def test_nonfinite_raise_and_allow() -> None:
    model = nn.Linear(2, 2)
    strict = ShardedEMA(model, 0.5, nonfinite="raise")
    careless = ShardedEMA(model, 0.5, nonfinite="allow")
    before = averages(strict)
    with torch.no_grad():
        model.bias[0] = -math.inf
    with pytest.raises(NonFiniteError, match="among them \\['bias'\\]"):
        strict.update()
    assert_equal(averages(strict), before)
    assert strict.num_updates == 1  # as on the ranks that have seen nothing
    careless.update()
    assert not torch.isfinite(careless.state_dict()["ema.bias"]).all()
    with pytest.warns(EMAWarning, match="hold NaN or Inf as their average starts"):
        ShardedEMA(model, 0.5)


def test_what_is_not_finite_in_a_loaded_average_heals(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    careless = ShardedEMA(model, 0.5, nonfinite="allow")
    with torch.no_grad():
        model.weight[0, 1] = math.nan
    careless.update()
    careless.save(tmp_path / "x", step=1)
    with torch.no_grad():
        model.weight[0, 1] = 3.0
    ema = ShardedEMA(model, 0.5)
    with pytest.warns(EMAWarning, match=r"loaded holds NaN or Inf .* among them \['weight'\]"):
        ema.load(tmp_path / "x")
    before = averages(ema)["weight"]
    assert math.isnan(before[0, 1])
    ema.update()
    before[0, 1] = 3.0
    assert torch.equal(averages(ema)["weight"], before.lerp(model.weight.detach(), 0.5))
    careless.load(tmp_path / "x")  # says nothing: they are allowed
    careless.update()
    assert math.isnan(averages(careless)["weight"][0, 1])


def test_warnings_about_an_average_that_is_no_use() -> None:
    model = nn.Linear(4, 4)
    with pytest.warns(EMAWarning, match="spans 10,000 steps but the run has 100"):
        ShardedEMA(model, 0.9999, total_steps=100)
    still = ShardedEMA(model, 1.0)
    frozen = ShardedEMA(model, 0.999, shadow_dtype=torch.bfloat16, force_dtype=True)
    fine = ShardedEMA(model, 0.8)
    with torch.no_grad():
        model.weight.mul_(1.001)
        model.bias.mul_(1.001)
    for _ in range(20):
        for ema in (still, frozen, fine):
            ema.update()
    with pytest.warns(EMAWarning, match="decay is 1, so it never will"):
        still.metrics()
    with pytest.warns(EMAWarning, match="rounds every update away"):
        frozen.metrics()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine.metrics()
        fine.close()
    slow = ShardedEMA(model, 0.999)
    slow.update()
    with pytest.warns(EMAWarning, match="100% of the average 'ema' is still the weights"):
        slow.close()
    slow.close()
    with pytest.raises(StateError, match="closed"):
        slow.update()


def run(ema: ShardedEMA, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.999)
        ema.update()


USES: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "swap": lambda ema, path: ema.swap().__enter__(),
    "copy_to": lambda ema, path: ema.copy_to(),
    "save": lambda ema, path: ema.save(path, step=1),
    "metrics": lambda ema, path: ema.metrics(),
    "close": lambda ema, path: ema.close(),
}


@pytest.mark.parametrize("use", USES)
def test_an_average_used_while_much_of_it_is_its_seed(use: str, tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    ema = ShardedEMA(model, 0.999)
    run(ema, model, 120)
    left, more = 0.999**120, math.ceil(math.log(0.05 / 0.999**120) / math.log(0.999))
    said = f"after 120 steps {left:.0%} of the average 'ema' .* after {more:,} more steps"
    with pytest.warns(EMAWarning, match=said) as seen:
        USES[use](ema, tmp_path / "one")
    assert len(seen) == 1 and "sharded-ema advise" in str(seen[0].message)
    if use in ("metrics", "save"):  # said once
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ema.metrics()
            ema.save(tmp_path / "two", step=2)
            ema.close()


GOOD: tuple[dict[str, Any], ...] = (
    {},  # the default
    {"schedule": 0.97},
    {"schedule": "power:0.1"},
    {"schedule": 0.999, "start_step": 1000},  # not begun: it is the weights
    {"schedule": 0.999, "total_steps": 5000},  # by whose end it is gone
)


# Closed before its end, a run has not done what was planned.
@pytest.mark.parametrize(
    ("use", "settings"), [(u, s) for u in USES for s in GOOD if u != "close" or s is not GOOD[-1]]
)
def test_an_average_that_forgets_its_seed_is_not_warned_of(
    use: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema = ShardedEMA(model, **settings)
        run(ema, model, 120)
        USES[use](ema, tmp_path / "one")


def test_the_first_lines_of_a_log_are_not_warned_of() -> None:
    model = nn.Linear(4, 4)
    ema = ShardedEMA(model, 0.999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            run(ema, model, 10)
            ema.metrics()


def test_the_default_has_forgotten_its_seed_from_step_4_on() -> None:
    model = nn.Linear(4, 4)
    ema = ShardedEMA(model)
    run(ema, model, 4)
    left = math.prod(min(0.9999, (1 + n) / (10 + n)) for n in range(1, 5))
    assert ema.metrics()["ema/seed_weight/ema"] == pytest.approx(left, abs=0) and left < 0.01


def test_metrics_and_memory() -> None:
    model = nn.Linear(10, 10)
    ema = ShardedEMA(model, {"a": 0.9, "b": HalfLife(100)})
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update()
    found = ema.metrics(distance=True)
    assert found["ema/num_updates"] == found["ema/applied_steps"] == 1
    assert found["ema/horizon_steps/a"] == pytest.approx(10)
    assert found["ema/seed_weight/b"] == pytest.approx(2 ** (-1 / 100))
    live = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
    mean = torch.cat([averages(ema, "a")[n].reshape(-1) for n in ("weight", "bias")]).double()
    assert found["ema/distance/a"] == pytest.approx(float((mean - live).norm() / live.norm()))
    assert ema.memory == {
        "shadow": 880,
        "ideal": 880,
        "host": 880,
        "swap_backup": 0,
        "staging": 0,
        "transfer": 0,
    }
    with ema.swap("a"):
        assert ema.memory["swap_backup"] == 440
    assert ema.decay == {"a": 0.9, "b": 2 ** (-1 / 100)}


def test_load_state_dict_takes_full_tensors_and_refuses_strangers() -> None:
    run, other = build("plain"), build("plain", seed=2)
    ema, into = ShardedEMA(run.target, 0.9), ShardedEMA(other.target, 0.9)
    run.step(0)
    ema.update()
    state = {key: value for key, value in ema.state_dict().items() if key[0] != "_"}
    with pytest.raises(CheckpointMismatchError, match="has no '_meta'"):
        into.load_state_dict(state)
    state["_meta"] = ema.state_dict()["_meta"]
    into.state_dict()  # nothing was loaded, so it can still be used
    in_place = {k: v for k, v in into.state_dict().items() if k != "_meta"}
    with pytest.raises(CheckpointMismatchError):
        into.load_state_dict(in_place)
    with pytest.raises(StateError, match="loaded in place"):
        into.update()  # DCP may have left another model's values behind
    into.load_state_dict({k: v.clone() for k, v in state.items()})
    assert_equal(averages(into), averages(ema))
    assert into.num_updates == 1
    state.pop("ema.one")
    with pytest.raises(CheckpointMismatchError, match=r"lacks 1 \(ema\.one\)"):
        into.load_state_dict(state)
    into.load_state_dict(state, strict=False)


def test_device_of_the_shadow_and_reference_kernel() -> None:
    run = build("plain")
    ema = ShardedEMA(run.target, 0.9, device="cpu", impl="reference", nonfinite="allow")
    fast = ShardedEMA(run.target, 0.9)
    for index in range(5):
        run.step(index)
        ema.update()
        fast.update()
    assert_equal(averages(ema), averages(fast))


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_dtypes_that_the_format_lacks_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex32))
    with pytest.warns(EMAWarning, match=r"buffers \['phase'\] are complex numbers of two float16"):
        ema = ShardedEMA(model, 0.9)
    with pytest.raises(CheckpointWriteError, match=r"_buffers\.phase has dtype torch\.complex32"):
        ema.save(tmp_path / "x", step=1)
    assert not list(tmp_path.iterdir())
    ShardedEMA(model, 0.9, buffers="ignore").save(tmp_path / "x", step=1)


def test_patterns_know_all_names_of_a_tied_weight_and_no_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    assert "0.weight" not in ShardedEMA(model, exclude="1.weight").names
    assert ShardedEMA(model, include="1.weight").names == ["0.weight"]
    ema = ShardedEMA(model, buffers="average", include="2.weight")
    assert ema.names == ["2.weight", "2.running_mean", "2.running_var"]
    for buffers in ("average", "copy"):
        with pytest.raises(
            ConfigError, match=r"no parameter; it matches the buffer 2\.running_var"
        ):
            ShardedEMA(model, buffers=buffers, exclude="2.running_var")


def test_buffers_by_pattern(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))
    model.register_buffer("queue", torch.ones(2))
    wave = torch.ones(2, dtype=torch.complex64)
    model.register_buffer("wave", wave)
    rules = {"*.running_mean": "average", "1.*": "ignore", "[w0]*": "average"}
    ema = ShardedEMA(model, 0.5, include="0.weight", buffers=rules)
    averaged = {"0.weight", "0.running_mean", "0.running_var", "1.running_mean", "wave"}
    assert set(ema.names) == averaged
    stored = {key for key in ema.state_dict() if key.startswith("_buffers")}
    assert stored == {"_buffers.0.num_batches_tracked", "_buffers.queue"}  # the rest is copied
    wave.mul_(3j)
    ema.update()
    with ema.swap():
        assert wave.tolist() == [0.5 + 1.5j] * 2
    ema.save(tmp_path / "x", step=1)
    said = inspect(tmp_path / "x").facts["averages"][0]["buffers"]["policy"]
    assert list(json.loads(said).items()) == list(rules.items())
    assert ShardedEMA(model, 0.5, include="0.weight", buffers=rules).load(tmp_path / "x") == 1
    model[1].register_buffer("late", torch.ones(1))  # type: ignore[union-attr]
    ema.state_dict()  # says nothing: it would be ignored
    model.register_buffer("later", torch.ones(1))
    with pytest.warns(EMAWarning, match=r"1 parameters or buffers were added .* \['later'\]"):
        ema.state_dict()


@pytest.mark.parametrize(
    ("buffers", "match"),
    [
        ({"*.runing_mean": "average"}, "of buffers matches no persistent buffer"),
        ({"*": "mean"}, r"must be one of copy, average, ignore, .* got 'mean' for '\*'"),
        ({}, "a dict with one of them for each pattern"),
        ({"*": None}, "a dict with one of them for each pattern"),
        (("average",), "a dict with one of them for each pattern"),
        ("all", "buffers must be one of copy, average, ignore"),
    ],
)
def test_bad_rules_for_buffers(buffers: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ShardedEMA(nn.Sequential(nn.BatchNorm1d(2)), buffers=buffers)


def test_a_parameter_may_be_called_meta(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("_meta", nn.Parameter(torch.ones(3)))
    ema = ShardedEMA(model, 0.9)
    for name in ("safetensors", "dcp"):
        ema.save(tmp_path / name, step=1, format=name)
        assert ema.load(tmp_path / name) == 1
    with pytest.raises(ConfigError, match="step must be an int"):
        ema.save(tmp_path / "x", step="7")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be an int"):
        ShardedEMA(model, update_every=2.5)  # type: ignore[arg-type]


def test_replace_removes_checkpoints_only(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.9)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    with pytest.raises(CheckpointExistsError, match="removes nothing else"):
        ema.save(tmp_path / "thesis", step=1, replace=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "one"
    ema.save(tmp_path / "x.old-1", step=1)
    with pytest.raises(CheckpointNotFoundError):
        ema.load(tmp_path / "x")  # what a user has named so is not a leftover of ours
    ema.save(tmp_path / "x", step=2, replace=True)
    assert (ema.load(tmp_path / "x.old-1"), ema.load(tmp_path / "x")) == (1, 2)


def test_an_average_can_be_saved_while_the_weights_are_nan(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.9)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    ema.update()
    with pytest.warns(EMAWarning, match="NaN or Inf"):
        ema.save(tmp_path / "x", step=1)
    assert ema.load(tmp_path / "x") == 1
    assert math.isnan(ema.metrics(distance=True)["ema/distance/ema"])


def test_inference_mode_leaves_no_inference_tensors_behind() -> None:
    model = nn.BatchNorm1d(2)
    with torch.inference_mode():
        ema = ShardedEMA(model, 0.9, buffers="average")
    model.bfloat16()
    with torch.inference_mode(), ema.swap():
        pass
    with torch.no_grad():
        model.weight[0] = math.nan
    ema.update()
    with torch.inference_mode(), ema.swap():
        pass
    ema.update()
    assert ema.num_updates == 2


def test_a_swap_restores_whatever_its_body_did_to_the_model() -> None:
    model = nn.BatchNorm1d(2)
    ema = ShardedEMA(model, 0.5, buffers="average")
    with torch.no_grad():
        model.weight.fill_(3.0)
    with pytest.raises(BindError, match="has been removed"), ema.swap():
        model.running_mean = None
    assert model.weight.tolist() == [3.0, 3.0]
    model.running_mean = torch.ones(2)
    with ema.swap():
        model.double()
        model.running_mean = torch.full((2,), 7.0)
    assert model.weight.tolist() == [3.0, 3.0] and model.weight.dtype is torch.float64
    assert model.running_mean.tolist() == [1.0, 1.0]


def test_parameters_that_cannot_be_averaged_are_named() -> None:
    for parameter, match in (
        (torch.randn(3, dtype=torch.complex64).conj(), "parameter p is conjugated lazily"),
        (torch.randn(1).expand(4), "parameter p is an expanded view"),
        (torch.empty(4, dtype=torch.float4_e2m1fn_x2), "parameter p packs two elements"),
    ):
        model = nn.Linear(2, 2)
        model.register_parameter("p", nn.Parameter(parameter))
        with pytest.raises(BindError, match=match):
            ShardedEMA(model)


def test_what_is_excluded_may_be_of_any_kind() -> None:
    model = nn.Linear(2, 2)
    model.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64).conj())
    model.quantised = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    with pytest.raises(BindError, match="wave is conjugated"):
        ShardedEMA(model, exclude="quantised")
    with pytest.raises(BindError, match="quantised is a TwoTensor"):
        ShardedEMA(model, exclude="wave")
    assert ShardedEMA(model, exclude=["wave", "quantised"]).names == ["weight", "bias"]


class Quantised(torch.Tensor):
    """What can neither be viewed nor sliced, and says nothing of what it is made of."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func.overloadpacket.__name__ == "detach":
            return cls(args[0].values)
        raise NotImplementedError(f"{func} of a Quantised")


@pytest.mark.parametrize("kind", [Quantised, lambda t: TwoTensor(t, t)])
def test_what_is_quantised_and_frozen(kind, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(kind(torch.ones(2, 2)), requires_grad=False)
    with pytest.raises(BindError, match=r'0\.weight is frozen and a \w+, .* frozen="skip"'):
        ShardedEMA(model, 0.9, frozen="save")
    ema = ShardedEMA(model, 0.9, frozen="skip")
    ema.update()
    ema.save(tmp_path / "c", step=1)
    assert ema.load(tmp_path / "c", verify=True) == 1
    model.register_buffer("scales", kind(torch.ones(3)))
    with pytest.raises(BindError, match=r'buffer scales is a \w+, .* buffers={"scales": "ignore"}'):
        ShardedEMA(model, 0.9, frozen="skip")
    ShardedEMA(model, 0.9, frozen="skip", buffers={"scales": "ignore"})


def test_tensors_without_shape_or_memory_are_named() -> None:
    with pytest.raises(BindError, match=r"0\.weight of a LazyLinear is not initialised"):
        ShardedEMA(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(BindError, match=r"running_mean of a LazyBatchNorm1d is not initialised"):
        ShardedEMA(nn.LazyBatchNorm1d(affine=False))
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(BindError, match=r"weight has the layout torch\.sparse_coo"):
        ShardedEMA(model)


@pytest.mark.parametrize("impl", ["fused", "foreach", "reference"])
def test_a_default_device_is_not_asked_for_anything(impl: str, tmp_path: Path) -> None:
    """As after torch.set_default_device("cuda"); what lay on the meta device would be lost."""
    run = build("plain")
    expected = as_float(run.gather())
    x = torch.ones(2, 7)
    optimizer = torch.optim.SGD(run.bare.parameters(), lr=0.1)
    with torch.device("meta"):
        ema = ShardedEMA(run.target, 0.9, impl=impl, buffers="average")
        ema.attach(optimizer)
        run.target(x).sum().backward()
        optimizer.step()
        reference_step(expected, run.gather(), 1 - 0.9)
        assert ema.metrics(distance=True)["ema/distance/ema"] > 0
        for asynchronous in (False, True):
            path = tmp_path / str(asynchronous)
            ema.save(path, step=1, asynchronous=asynchronous).result()
            ema.reseed()
            ema.load(path, verify=True)
        with ema.swap():
            assert_equal(run.gather(), expected)
        ema.load_state_dict(ema.state_dict())
        ema.close()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"]
)
def test_a_copy_is_attached_to_nothing(copied: Any, tmp_path: Path) -> None:
    run = build("plain")
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    run.step(0)
    ema.save(tmp_path / "a", step=1, asynchronous=True)
    other, again = copied((run, ema))
    before = averages(again)
    assert_equal(before, averages(ema))
    run.step(1)
    assert_equal(averages(again), before)
    again.attach(other.optimizer)
    other.step(1)
    assert_equal(averages(again), averages(ema))
    again.save(tmp_path / "other" / "b", step=2)
    for each in (ema, again):
        each.close()


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_around_a_swap_uses_the_average(grad: bool) -> None:
    """It keeps casts of parameters to the end of its region."""
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update()
    other.load_state_dict(averages(ema))
    x = torch.ones(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
        raw, expected = model(x), other(x)
        with ema.swap():
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), raw)
        ema.copy_to()
        assert torch.equal(model(x), expected)


def test_names_in_data_parallel() -> None:
    model = nn.DataParallel(nn.Linear(2, 2))
    assert ShardedEMA(model).names == ["weight", "bias"]


def test_names_in_a_module_of_fabric() -> None:
    inner = nn.BatchNorm1d(2)
    model = nn.Module()
    model._forward_module = nn.DataParallel(inner)
    model._original_module = inner
    names = ["weight", "bias", "running_mean", "running_var"]
    assert ShardedEMA(model, buffers="average").names == names


def test_average_switched_on_for_an_older_run(tmp_path: Path) -> None:
    """The average was made before the weights of a run without one were loaded."""
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.5)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "old", no_dist=True)
    ema.update()
    with pytest.raises(CheckpointMismatchError, match=r"holds 0 averages.*reseed\(\)"):
        ema.load(tmp_path / "old")
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.reseed()
    assert ema.num_updates == 0
    assert_equal(averages(ema), {n: p.detach() for n, p in model.named_parameters()})
    with ema.swap(), pytest.raises(SwapError):
        ema.reseed()
    late = ShardedEMA(model, 0.5, start_step=2)
    late.reseed()
    late.update()
    assert late.num_updates == 0, "reseeding does not begin before start_step"


def test_a_profile_that_the_checkpoint_lacks_starts_from_the_weights(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    first = ShardedEMA(model, {"a": 0.5})
    first.update()
    with torch.no_grad():
        model.weight.fill_(3.0)
    first.update()
    first.save(tmp_path / "x", step=2)
    with torch.no_grad():
        model.weight.fill_(4.0)
    second = ShardedEMA(model, {"a": 0.5, "b": 0.9})
    with torch.no_grad():
        model.weight.fill_(5.0)
    with pytest.raises(CheckpointMismatchError):
        second.load(tmp_path / "x")
    with pytest.warns(EMAWarning, match="has no average b, which starts anew"):
        second.load(tmp_path / "x", strict=False)
    assert_equal(averages(second, "a"), averages(first, "a"))
    assert bool((averages(second, "b")["weight"] == 5.0).all())


def test_nothing_in_common_is_not_a_load(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ShardedEMA(model, {"a": 0.9}).save(tmp_path / "x", step=3)
    other = ShardedEMA(model, {"b": 0.9})
    with pytest.raises(CheckpointMismatchError, match="none of the averages"):
        other.load(tmp_path / "x", strict=False)
    other.update()


def test_a_save_needs_its_step_by_name(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.9)
    for call in (lambda: ema.save(tmp_path / "x", 7), lambda: ema.save(tmp_path / "x")):
        with pytest.raises(ConfigError, match=r"by name: save\(path, step=(7|\.\.\.)\)"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_decay_per_update(tmp_path: Path) -> None:
    """Every third step by a half, as references move; what is said of it counts steps."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    settings: dict[str, Any] = {"update_every": 3, "decay_per": "update"}
    with pytest.warns(EMAWarning, match=r"spans 6 steps .* at its end 25%"):
        ema = ShardedEMA(model, 0.5, **settings, total_steps=8)
    average = model.weight.detach().clone()
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 4))
        ema.update()
        if step % 3 == 0:
            average.lerp_(model.weight.detach(), 0.5)
        if step == 4:
            ema.save(tmp_path / "step_4", step=4)
            ema = ShardedEMA(model, 0.5, **settings)
            ema.load(tmp_path / "step_4")
        assert torch.equal(averages(ema)["weight"], average), step
    found = ema.metrics()
    assert found["ema/horizon_steps/ema"] == 6
    assert found["ema/seed_weight/ema"] == 0.25
    taken = ShardedEMA(model, 0.5, **settings)
    torch.save(model.state_dict(), tmp_path / "old.pt")
    taken.load(tmp_path / "old.pt", num_updates=7)
    assert taken.metrics()["ema/seed_weight/ema"] == 0.25


def test_names_of_metrics() -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.9)
    found = ema.metrics(prefix="teacher/")
    assert all(name.startswith("teacher/") for name in found)
    assert all(name.startswith("ema/") for name in ema.metrics())
    assert {**ema.metrics()}.keys() == ema.metrics().keys()
    with pytest.warns(DeprecationWarning, match="is called 'teacher/num_updates'"):
        assert found["num_updates"] == 0  # as it was called once
    with pytest.raises(KeyError, match="x"):
        found["x"]
