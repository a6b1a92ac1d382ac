"""An average alone: no model, no optimizer, no ranks; it is told of steps and given tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_ema.averaging.average import Average, check_dtype
from sharded_ema.averaging.schedules import Constant, HalfLifeFraction, Power, Schedule, Warmup
from sharded_ema.errors import ConfigError, NonFiniteError, StateError


def make(live: list[Tensor], schedule: Schedule, **settings: Any) -> Average:
    names = [f"t{i}" for i in range(len(live))]
    average = Average({"p": schedule}, live, names, **settings)
    average.start()
    return average


@pytest.mark.parametrize("every", [1, 2, 5, 20])
def test_linear_ramp_has_the_same_average_for_every_update_interval(every: int) -> None:
    """The average of a ramp lags by its horizon, however seldom it is updated."""
    live = [torch.zeros(1)]
    average = make(live, Power(gamma=6.94), update_every=every)
    for step in range(1, 2001):
        live[0].fill_(step)
        average.advance(live)
    mean = float(average.shadow.views["p"][0]) / 2000
    assert mean == pytest.approx((6.94 + 1) / (6.94 + 2), abs=0.01)


def test_it_equals_a_plain_loop() -> None:
    schedule = Warmup(0.99)
    live = [torch.randn(7), torch.randn(3, 2)]
    average = make(live, schedule, start_step=2)
    expected: list[Tensor] = []
    for step in range(1, 9):
        for tensor in live:
            tensor.add_(torch.randn(tensor.shape))
        started = average.advance(live)
        assert (started is None) == (step != 2)
        if step <= 2:
            expected = [tensor.clone() for tensor in live]
        else:
            for kept, tensor in zip(expected, live, strict=True):
                kept.lerp_(tensor, 1 - schedule.decay(step - 2))
    for view, kept in zip(average.shadow.views["p"], expected, strict=True):
        assert torch.equal(view, kept)
    share = math.prod(schedule.decay(n) for n in range(1, 7))
    assert average.seed_weights == {"p": pytest.approx(share)}
    assert average.num_updates == 6


def test_before_its_start_it_mirrors_the_parameters() -> None:
    live = [torch.ones(2)]
    average = make(live, Constant(0.5), start_step=5)
    live[0].fill_(3.0)
    average.advance(live)
    assert average.shadow.views["p"][0].tolist() == [1.0, 1.0]
    average.mirror()
    assert average.shadow.views["p"][0].tolist() == [3.0, 3.0]


def test_a_step_that_raises_is_counted_and_keeps_the_values() -> None:
    live = [torch.ones(2)]
    average = make(live, Constant(0.5), nonfinite="raise")
    live[0][1] = math.nan
    with pytest.raises(NonFiniteError, match="after step 1, among them"):
        average.advance(live)
    assert average.shadow.views["p"][0].tolist() == [1.0, 1.0]
    assert average.num_updates == 1 and average.seed_weights == {"p": 0.5}


def test_a_broken_average_is_refused_until_it_starts_anew() -> None:
    live = [torch.ones(2)]
    average = make(live, Constant(0.5))
    average.require_whole()
    average.broken = "it was torn"
    with pytest.raises(StateError, match="cannot be used: it was torn"):
        average.require_whole()
    average.start()
    average.require_whole()


def test_counters_go_on_from_a_description() -> None:
    live = [torch.zeros(3)]
    average = make(live, Constant(0.9), update_every=4)
    for _ in range(6):
        average.advance(live)
    other = Average({"p": Constant(0.9), "q": Constant(0.5)}, live, ["t0"], update_every=4)
    other.start()
    assert other.go_on_from(average.describe()) == ["q"]
    assert other.clock.to_dict() == average.clock.to_dict()
    assert other.seed_weights == {"p": pytest.approx(0.9**4), "q": 1.0}


@pytest.mark.parametrize(
    ("dtype", "schedule", "total"),
    [
        (torch.bfloat16, Constant(0.999), None),
        (torch.bfloat16, Warmup(0.9999), None),
        (torch.bfloat16, HalfLifeFraction(0.05), None),
        (torch.float16, Constant(0.9999), None),
        (torch.bfloat16, Power(gamma=6.94), 10_000),
    ],
)
def test_a_dtype_in_which_nothing_would_move(
    dtype: torch.dtype, schedule: Schedule, total: int | None
) -> None:
    with pytest.raises(ConfigError, match=r"average 'p' does not move: at a decay of 0\.9"):
        check_dtype(dtype, {"p": schedule}, total)
    check_dtype(torch.float32, {"p": schedule}, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_in_which_it_moves(dtype: torch.dtype) -> None:
    """Accepted where it is right: near its end the average still follows."""
    check_dtype(dtype, {"p": Constant(0.9)}, None)
    live = [torch.zeros(8)]
    average = make(live, Constant(0.9), dtype=dtype)
    live[0].fill_(1.0)
    for _ in range(100):
        average.advance(live)
    assert float(average.shadow.views["p"][0][0]) > 0.97


SCHEDULES = [
    Constant(0.9),
    Constant(0.0),
    Power(gamma=6.94),
    HalfLifeFraction(0.1),
    Warmup(0.99),
    Warmup(0.99, kind="inverse_gamma"),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("start_step", [0, 2])
@pytest.mark.parametrize("impl", ["fused", "foreach", "reference"])
def test_a_seed_that_is_not_finite_heals_under_every_schedule(
    schedule: Schedule, nonfinite: str, start_step: int, impl: str
) -> None:
    live = [torch.randn(5), torch.randn(6000), torch.randn(3, 2).bfloat16()]
    live += [torch.randn(4, dtype=torch.complex64)]
    live[0][1], live[1][7], live[2][0, 0] = math.nan, math.inf, -math.inf
    live[3][2] = complex(1.0, math.nan)
    settings = {"nonfinite": nonfinite, "start_step": start_step, "impl": impl}
    average = make(live, schedule, **settings)
    for _ in range(start_step):
        average.mirror()
        try:
            average.advance(live)
        except NonFiniteError:
            assert nonfinite == "raise"
    assert average.clock.seed_step == start_step
    loop = [t.double() if not t.is_complex() else torch.view_as_real(t).double() for t in live]
    for n in range(1, 4):
        live = [torch.randn_like(tensor) for tensor in live]
        if n == 1 and nonfinite == "skip":
            live[1][7] = math.nan  # longer than the others
        average.advance(live)
        decay = schedule.decay(n)
        for view, kept, now in zip(average.shadow.views["p"], loop, live, strict=True):
            now = torch.view_as_real(now) if now.is_complex() else now
            view = torch.view_as_real(view) if view.is_complex() else view
            value = torch.where(torch.isfinite(now), now.double(), kept)
            kept.copy_(torch.where(torch.isfinite(kept), kept, value))
            kept.lerp_(torch.where(torch.isfinite(value), value, kept), 1 - decay)
            bad = ~torch.isfinite(kept)
            assert bool((~torch.isfinite(view) == bad).all())
            assert torch.allclose(view[~bad].double(), kept[~bad], atol=1e-5)
        assert average.shadow.collect_skipped() == (1 if nonfinite == "skip" else 0)
    assert all(bool(torch.isfinite(view).all()) for view in average.shadow.views["p"])


def test_what_is_allowed_stays_but_where_nothing_of_it_is_left() -> None:
    for schedule, stays in ((Constant(0.9), True), (Power(gamma=6.94), False)):
        live = [torch.tensor([1.0, math.nan, math.inf])]
        average = make(live, schedule, nonfinite="allow")
        live[0].fill_(2.0)
        average.advance(live)
        assert bool(torch.isfinite(average.shadow.views["p"][0]).all()) is not stays


def test_the_precision_of_the_shadow_is_that_of_each_parameter() -> None:
    live = [torch.randn(3).to(d) for d in (torch.float64, torch.bfloat16, torch.float32)]
    live.append(torch.randn(3, dtype=torch.complex128))
    average = make(live, Constant(0.99))
    dtypes = [view.dtype for view in average.shadow.views["p"]]
    assert dtypes == [torch.float64, torch.float32, torch.float32, torch.complex128]
    assert average.shadow.num_bytes == 3 * (8 + 4 + 4 + 16)
    assert sum(average.shadow.allocated.values()) == average.shadow.num_bytes
    exact = live[0].clone()
    for _ in range(200):
        live[0].mul_(1.0 + 1e-10)  # which fp32 would not see
        average.advance(live)
        exact = 0.99 * exact + 0.01 * live[0]
    assert torch.allclose(average.shadow.views["p"][0], exact, rtol=1e-14, atol=0)
