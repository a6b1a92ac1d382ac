"""The clock: at which applied steps the average starts and moves, and over which steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sharded_ema.averaging.clock import Clock
from sharded_ema.averaging.schedules import Constant, Warmup
from sharded_ema.errors import ConfigError


def started(**settings: Any) -> Clock:
    clock = Clock(**settings)
    clock.seeded()
    return clock


def until_due(clock: Clock) -> None:
    clock.applied_steps += 1
    while not clock.is_due:
        clock.applied_steps += 1


def test_late_start_and_windows() -> None:
    clock = Clock(update_every=10, start_step=37)
    starts, moves = [], []
    for _ in range(80):
        clock.applied_steps += 1
        if clock.starts:
            starts.append(clock.applied_steps)
            clock.seeded()
        elif clock.is_due:
            moves.append(clock.applied_steps)
            clock.taken_in()
    assert (starts, moves) == ([37], [47, 57, 67, 77])
    assert clock.num_updates == 80 - 37


def test_window_is_the_product_of_its_decays() -> None:
    clock = started(update_every=4)
    schedule = Warmup(0.999)
    until_due(clock)
    assert clock.window_decay(schedule) == math.prod(schedule.decay(n) for n in (1, 2, 3, 4))
    clock.taken_in()
    until_due(clock)
    assert clock.window_decay(schedule) == math.prod(schedule.decay(n) for n in (5, 6, 7, 8))
    assert clock.window_decay(Constant(0.9)) == pytest.approx(0.9**4)


def test_a_decay_per_update_is_that_of_its_step_once() -> None:
    clock, schedule = started(update_every=4, decay_per="update"), Warmup(0.999)
    for n in (4, 8, 12):
        until_due(clock)
        assert clock.window_decay(schedule) == schedule.decay(n)
        clock.taken_in()
    clock.applied_steps += 6  # resumed with another update_every
    assert clock.window_decay(schedule) == schedule.decay(18)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_a_decay_out_of_range_is_refused(value: float) -> None:
    class Broken:
        def decay(self, n: int) -> float:
            return value if n == 2 else 0.5

        def to_dict(self) -> dict[str, object]:
            return {"type": "Broken"}

    clock = started(update_every=2)
    clock.applied_steps += 2
    with pytest.raises(ConfigError, match=r"gives the decay .* at n = 2"):
        clock.window_decay(Broken())  # type: ignore[arg-type]
