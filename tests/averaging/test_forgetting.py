"""Shares of the seed against a plain product of decays."""

from __future__ import annotations

import doctest
import math
from dataclasses import dataclass
from typing import Any

import pytest

from sharded_ema.averaging import forgetting
from sharded_ema.averaging.forgetting import describe_seed, share_left, steps_to_forget
from sharded_ema.averaging.schedules import (
    Constant,
    Cosine,
    HalfLife,
    HalfLifeFraction,
    Power,
    Schedule,
    Warmup,
)


@dataclass(frozen=True)
class Alternating:
    """A schedule of a user's own."""

    def decay(self, n: int) -> float:
        return 0.9 if n % 2 else 0.99

    def to_dict(self) -> dict[str, Any]:
        return {"type": "Alternating"}


SCHEDULES = [
    Constant(0.99),
    Constant(1.0),
    Constant(0.0),
    HalfLife(30),
    HalfLifeFraction(0.5),
    Warmup(0.95),
    Warmup(0.9, kind="inverse_gamma", min_decay=0.5),
    Power(gamma=2.0),
    Alternating(),
]


def product(schedule: Schedule, first: int, last: int) -> float:
    return math.prod(schedule.decay(n) for n in range(first, last + 1))


def test_doctests() -> None:
    assert doctest.testmod(forgetting).failed == 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("after", [0, 1, 40])
@pytest.mark.parametrize("steps", [0, 1, 2, 300])
def test_share(schedule: Schedule, after: int, steps: int) -> None:
    expected = product(schedule, after + 1, after + steps)
    assert share_left(schedule, steps, after=after) == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("after", [0, 40])
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_steps(schedule: Schedule, after: int, share: float) -> None:
    steps = steps_to_forget(schedule, share, left=0.9, after=after)
    if schedule == Constant(1.0):
        assert steps is None
        return
    assert steps is not None
    assert 0.9 * product(schedule, after + 1, after + steps) <= share * (1 + 1e-9)
    assert 0.9 * product(schedule, after + 1, after + steps - 1) > share * (1 - 1e-9)


def test_nothing_is_waited_for_that_is_gone_already() -> None:
    assert steps_to_forget(Constant(0.9), 0.05, left=0.01) == 0


def test_a_seed_that_hardly_fades_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "_FAR", 1000)
    assert steps_to_forget(HalfLifeFraction(100.0), 0.05) is None
    assert "too many steps" in describe_seed("ema", 5, 0.9, None)


def test_decays_of_updates_forget_nothing_in_between() -> None:
    schedule = forgetting.per_step(Warmup(0.9), "update", 8)
    for steps in (7, 8, 50):
        wanted = math.prod(Warmup(0.9).decay(n) for n in range(8, steps + 1, 8))
        assert share_left(schedule, steps) == pytest.approx(wanted)
    assert steps_to_forget(forgetting.per_step(Constant(0.5), "update", 10), 0.05) == 50
    assert forgetting.per_step(Constant(0.5), "step", 10) == Constant(0.5)


def test_what_has_risen_to_one_is_never_forgotten() -> None:
    assert steps_to_forget(Cosine(0.999, steps=10), 0.05) is None
    assert share_left(Cosine(0.999, steps=10), 10**9) == pytest.approx(
        math.prod(Cosine(0.999, steps=10).decay(n) for n in range(1, 11))
    )
