"""``advise``: what a decay means for a run of so many steps, before the run is spent on it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sharded_ema.averaging.forgetting import MUCH_LEFT, share_left, steps_to_forget
from sharded_ema.averaging.schedules import (
    Constant,
    HalfLife,
    Power,
    Schedule,
    Warmup,
    horizon,
)
from sharded_ema.config import as_whole
from sharded_ema.errors import ConfigError
from sharded_ema.tools.report import Report

UNITS = ("steps", "tokens", "images")
# Of the run, where nothing else was asked for. Its weights spread over 7 % of the run; Karras et
# al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2023), find the best
# average between 5 and 25 %.
_HALF_LIFE_SHARE = 0.05
# Half-lives that are shown beside the one that was asked for, as multiples of it.
_NEIGHBOURS = (0.25, 0.5, 1.0, 2.0, 4.0)
_POINTS = 400
# Steps that are gone through one by one for a picture.
_DRAWN = 2_000_000


def advise(
    *,
    steps: int,
    batch: float | None = None,
    unit: str = "steps",
    decay: float | None = None,
    half_life: float | None = None,
    sigma_rel: float | None = None,
    plot: str | os.PathLike[str] | None = None,
) -> Report:
    """Say how long an average remembers in a run of ``steps``, and how much of its seed is left.

    Args:
        steps: optimizer steps of the run, from the start of the average on.
        batch: tokens or images in an optimizer step, over all ranks; for a ``unit`` other than
            steps.
        unit: of ``half_life``, and of what the report adds to steps: ``"steps"``, ``"tokens"`` or
            ``"images"``.
        decay: a constant decay per optimizer step.
        half_life: after so much training, in ``unit``, a weight counts half.
        sigma_rel: relative width of a power-function average. Of these three at most one; with
            none, a half-life of a twentieth of the run.
        plot: picture to write, of the weights that the steps have in the average at the end of the
            run, and of the share of the seed over the run; its name says the format. Needs
            Matplotlib.

    Returns:
        A report. ``ok`` is false if more than 5 % of the average would be its seed at the end.

    Raises:
        ConfigError: an argument is out of range, or two contradict each other.
    """
    steps = as_whole(steps, "steps", least=1)
    size = _batch(batch, unit)
    schedule = _asked_for(steps, size, decay, half_life, sigma_rel)
    report = Report(
        "advise",
        f"a run of {steps:,} steps",
        verdict=f"at its end no more than {MUCH_LEFT:.0%} of the average is its seed",
    )
    report.facts |= {
        "schedule": _text(schedule),
        **_row(schedule, steps),
        "steps_to_forget": steps_to_forget(schedule, MUCH_LEFT),
    }
    if unit != "steps":
        report.facts |= {
            f"{name}_{unit}": None if value is None else value * size
            for name, value in (
                ("run", steps),
                ("half_life", report.facts["half_life_steps"]),
                ("horizon", report.facts["horizon_steps"]),
            )
        }
    others = _neighbours(schedule)
    report.facts["neighbours"] = [
        {"schedule": _text(other), **_row(other, steps), "asked_for": other == schedule}
        for other in others
    ]
    left = report.facts["seed_weight"]
    if left > MUCH_LEFT:
        longest = steps / math.log2(1 / MUCH_LEFT)
        report.fail(
            f"at the end of the run {left:.0%} of the average would be the weights it was seeded "
            f"with; take a half-life below {longest:,.4g} steps, leave the schedule out "
            f"({_text(_default())}), or start from trained weights"
        )
    if plot is not None:
        _draw(others, schedule, steps, Path(plot))
        report.facts["plot"] = str(plot)
    return report


def _batch(batch: float | None, unit: str) -> float:
    """What a step takes in, in the unit."""
    if unit not in UNITS:
        raise ConfigError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if (batch is None) != (unit == "steps"):
        raise ConfigError(
            f"batch is the number of {'tokens or images' if unit == 'steps' else unit} in an "
            "optimizer step over all ranks: it goes with unit (--unit tokens or --unit images), "
            "and neither without the other"
        )
    size = 1.0 if batch is None else batch
    if not 0.0 < size < math.inf:
        raise ConfigError(f"batch must be a positive number, got {batch}")
    return size


def _asked_for(
    steps: int,
    size: float,
    decay: float | None,
    half_life: float | None,
    sigma_rel: float | None,
) -> Schedule:
    if sum(value is not None for value in (decay, half_life, sigma_rel)) > 1:
        raise ConfigError("give decay, half_life or sigma_rel, one of them")
    if decay is not None:
        return Constant(decay)
    if sigma_rel is not None:
        return Power(sigma_rel=sigma_rel)
    return HalfLife(half_life / size if half_life is not None else steps * _HALF_LIFE_SHARE)


def _default() -> Warmup:
    return Warmup(0.9999)


def _neighbours(schedule: Schedule) -> list[Schedule]:
    """Shorter and longer averages of the same kind, and the one that is kept unless asked."""
    found: list[Schedule] = []
    for factor in _NEIGHBOURS:
        if factor == 1.0:
            found.append(schedule)
        elif isinstance(schedule, Power):
            assert schedule.sigma_rel is not None
            if factor * schedule.sigma_rel < 12**-0.5:
                found.append(Power(sigma_rel=factor * schedule.sigma_rel))
        elif isinstance(schedule, HalfLife):
            found.append(HalfLife(schedule.steps * factor))
        elif 0.0 < schedule.decay(1) < 1.0:
            found.append(Constant(schedule.decay(1) ** (1.0 / factor)))
    return [*found, _default()]


def _text(schedule: Schedule) -> str:
    """As ``ShardedEMA`` takes it."""
    match schedule:
        case HalfLife():
            return f"half_life:{schedule.steps:.6g}"
        case Power():
            return f"power:{schedule.sigma_rel:.6g}"
        case Warmup():
            return f"warmup:{schedule.max_decay:.6g}"
    return f"{schedule.decay(1):.10g}"


def _row(schedule: Schedule, steps: int) -> dict[str, Any]:
    """What it is at the end of the run."""
    decay = schedule.decay(steps)
    return {
        "decay": decay,
        "half_life_steps": math.log(0.5) / math.log(decay) if 0.0 < decay < 1.0 else None,
        "horizon_steps": horizon(decay) if decay < 1.0 else None,  # JSON has no infinity
        "seed_weight": share_left(schedule, steps),
    }


# ---------------------------------------------------------------------- the picture


def _draw(schedules: Sequence[Schedule], chosen: Schedule, steps: int, path: Path) -> None:
    if steps > _DRAWN:
        raise ConfigError(f"a plot shows at most {_DRAWN:,} steps, got {steps:,}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs Matplotlib: pip install matplotlib") from None

    at = sorted({max(1, round(steps * i / _POINTS)) for i in range(1, _POINTS + 1)})
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    weights, seeds = figure.subplots(1, 2)
    for schedule in schedules:
        style = {"label": _text(schedule), "linewidth": 2.4 if schedule == chosen else 1.0}
        decays = [schedule.decay(n) for n in range(1, steps + 1)]
        # What each step counts at the end: what it was given, times all decays after it.
        after = list(accumulate(reversed(decays[1:]), lambda a, b: a * b, initial=1.0))[::-1]
        weights.plot(at, [(1.0 - decays[n - 1]) * after[n - 1] for n in at], **style)
        left = list(accumulate(decays, lambda a, b: a * b))
        seeds.plot(at, [left[n - 1] for n in at], **style)
    weights.set(
        title=f"Weight of each step after {steps:,}", xlabel="optimizer step", ylabel="weight"
    )
    seeds.axhline(MUCH_LEFT, color="gray", linestyle=":")
    seeds.set(
        title="Share of the average that is its seed",
        xlabel="optimizer step",
        ylabel="share",
        yscale="log",
        ylim=(1e-4, 1.2),
    )
    seeds.legend(fontsize="small")
    figure.savefig(path, dpi=120)
