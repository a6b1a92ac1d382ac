"""Schedules against the formulas of their papers, written out again here."""

from __future__ import annotations

import doctest
import math

import numpy
import pytest

from sharded_ema.averaging import schedules
from sharded_ema.averaging.schedules import (
    Constant,
    Cosine,
    HalfLife,
    HalfLifeFraction,
    Linear,
    Power,
    Schedule,
    Warmup,
    as_schedule,
    gamma_from_sigma_rel,
    horizon,
    parse_schedule,
    schedule_from_dict,
)
from sharded_ema.errors import ConfigError

ALL: list[Schedule] = [
    Constant(0.999),
    Warmup(0.9999),
    Warmup(0.9999, kind="inverse_gamma", inv_gamma=2.0, power=0.75, min_decay=0.1),
    HalfLife(500),
    HalfLifeFraction(0.05),
    Power(sigma_rel=0.1),
    Power(gamma=16.97),
    Linear(0.9, steps=100),
    Cosine(0.996, steps=1000, end=0.9999),
]


def test_doctests() -> None:
    assert doctest.testmod(schedules).failed == 0


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_survives_a_checkpoint(schedule: Schedule) -> None:
    assert schedule_from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_decay_is_a_decay(schedule: Schedule) -> None:
    for n in (1, 2, 3, 10, 1000, 10**9):
        assert 0.0 <= schedule.decay(n) <= 1.0


def test_warmup_formulas() -> None:
    tf, inverse = Warmup(0.9), Warmup(0.95, kind="inverse_gamma")
    for n in range(1, 200):
        assert tf.decay(n) == min(0.9, (1 + n) / (10 + n))
        s = n - 1
        expected = 0.0 if s == 0 else min(0.95, 1 - (1 + s / 1.0) ** (-2 / 3))
        assert inverse.decay(n) == pytest.approx(expected, abs=0)


def test_half_life_halves() -> None:
    assert math.prod(HalfLife(40).decay(n) for n in range(1, 41)) == pytest.approx(0.5)
    fraction = HalfLifeFraction(0.05)
    assert fraction.decay(2000) == 2 ** (-20 / 2000)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.15, 0.25, 0.288])
def test_power_exponent_is_the_cubic_root(sigma_rel: float) -> None:
    t = sigma_rel**-2
    roots = numpy.roots([1, 7, 16 - t, 12 - t])
    expected = max(r.real for r in roots if abs(r.imag) < 1e-9)
    assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(expected, rel=1e-9)


def test_power_profile_has_the_relative_width_asked_for() -> None:
    """Weights of all steps under Power(sigma_rel) have that standard deviation over their range."""
    steps = 4000
    schedule = Power(sigma_rel=0.1)
    weights = numpy.zeros(steps)
    for n in range(1, steps + 1):
        weights *= schedule.decay(n)
        weights[n - 1] += 1 - schedule.decay(n)
    times = numpy.arange(1, steps + 1) / steps
    mean = (weights * times).sum()
    deviation = math.sqrt((weights * (times - mean) ** 2).sum())
    assert weights.sum() == pytest.approx(1.0)
    assert deviation == pytest.approx(0.1, rel=2e-3)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("0.999", Constant(0.999)),
        ("warmup:0.9999", Warmup(0.9999)),
        ("warmup:0.99,kind=inverse_gamma,power=0.75", Warmup(0.99, "inverse_gamma", power=0.75)),
        ("half_life:2000", HalfLife(2000.0)),
        ("half_life_fraction:0.05", HalfLifeFraction(0.05)),
        ("power:0.1", Power(sigma_rel=0.1)),
        ("power:gamma=6.94", Power(gamma=6.94)),
    ],
)
def test_text(text: str, schedule: Schedule) -> None:
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "cosine:0.9",
        "half_life:abc",
        "half_life:0",
        "0.9,0.8",
        "power:sigma=0.1",
        "1.5",
        "-0.1",
        "nan",
        "power:0.1,gamma=3",
        "0.9,decay=0.5",
    ],
)
def test_unreadable_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_schedule(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(1.0001),
        lambda: Constant(-1e-9),
        lambda: Constant(math.nan),
        lambda: Warmup(0.9, kind="linear"),
        lambda: Warmup(0.9, min_decay=0.95),
        lambda: HalfLife(-3),
        lambda: HalfLifeFraction(math.inf),
        lambda: Power(),
        lambda: Power(sigma_rel=0.1, gamma=2.0),
        lambda: Power(sigma_rel=0.3),
        lambda: Power(gamma=-0.5),
        lambda: as_schedule(True),
        lambda: as_schedule([0.9]),  # type: ignore[arg-type]
        lambda: schedule_from_dict({"type": "Cosine"}),
        lambda: schedule_from_dict({"type": {"name": "Constant"}}),
        lambda: schedule_from_dict({"decay": 0.9}),
        lambda: schedule_from_dict({"type": "Constant", "speed": 3}),
    ],
)
def test_bad_settings_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_horizon() -> None:
    assert horizon(0.9) == pytest.approx(10)
    assert horizon(1.0) == math.inf


def test_decays_that_rise() -> None:
    linear, cosine = Linear(0.9, steps=100, end=0.99), Cosine(0.9, steps=100, end=0.99)
    for n in (1, 25, 50, 99):
        assert linear.decay(n) == pytest.approx(0.9 + 0.09 * n / 100)
        rise = (1 - math.cos(math.pi * n / 100)) / 2
        assert cosine.decay(n) == pytest.approx(0.9 + 0.09 * rise)
    for schedule in (linear, cosine):
        assert schedule.decay(100) == schedule.decay(10**6) == 0.99
    assert parse_schedule("cosine:0.9,steps=100,end=0.99") == cosine
    assert parse_schedule("linear:0.9,steps=100") == Linear(0.9, steps=100.0)
    for kind in (Linear, Cosine):
        with pytest.raises(ConfigError, match="a decay that falls from"):
            kind(0.9, steps=10, end=0.5)
        with pytest.raises(ConfigError, match="steps must be a positive"):
            kind(0.9, steps=0)
