"""Advice about decays, against the definition: a loop over the steps of the run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from sharded_ema import advise
from sharded_ema.averaging.schedules import parse_schedule
from sharded_ema.cli import main
from sharded_ema.errors import ConfigError


def loop(text: str, steps: int) -> float:
    """The share of the seed after so many steps."""
    left, schedule = 1.0, parse_schedule(text)
    for n in range(1, steps + 1):
        left *= schedule.decay(n)
    return left


@pytest.mark.parametrize(
    "asked",
    [{}, {"decay": 0.9999}, {"decay": 0.99}, {"half_life": 70.0}, {"sigma_rel": 0.2}],
    ids=str,
)
def test_every_row_is_what_the_schedule_does(asked: dict[str, float]) -> None:
    report = advise(steps=3000, **asked)
    rows = report.facts["neighbours"]
    assert [row["schedule"] for row in rows if row["asked_for"]] == [report.facts["schedule"]]
    assert rows[-1]["schedule"] == "warmup:0.9999"
    for row in [report.facts, *rows]:
        schedule = parse_schedule(row["schedule"])
        assert row["decay"] == pytest.approx(schedule.decay(3000), rel=1e-6)
        assert row["half_life_steps"] == pytest.approx(math.log(0.5, row["decay"]))
        assert row["horizon_steps"] == pytest.approx(1 / (1 - row["decay"]))
        expected = loop(row["schedule"], 3000)
        assert row["seed_weight"] == pytest.approx(expected, rel=1e-4, abs=1e-11)
    assert report.ok == (loop(report.facts["schedule"], 3000) <= 0.05)
    assert report.ok == (asked != {"decay": 0.9999})


def test_a_half_life_below_what_it_advises_will_do() -> None:
    (problem,) = advise(steps=300, decay=0.9999).problems
    assert "97% of the average" in problem
    longest = float(problem.partition("below ")[2].partition(" ")[0])
    assert advise(steps=300, half_life=0.999 * longest).ok
    assert not advise(steps=300, half_life=1.001 * longest).ok


def test_units() -> None:
    """The same half-life in tokens, whatever the batch: d ** k for a batch k times as large."""
    small = advise(steps=10_000, batch=2**18, unit="tokens", half_life=2**27).facts
    large = advise(steps=10_000, batch=2**20, unit="tokens", half_life=2**27).facts
    assert small["half_life_steps"] == pytest.approx(512)
    assert large["half_life_steps"] == pytest.approx(128)
    assert large["decay"] == pytest.approx(small["decay"] ** 4)
    assert small["half_life_tokens"] == pytest.approx(large["half_life_tokens"])
    assert small["run_tokens"] == 10_000 * 2**18
    assert "horizon_images" in advise(steps=9, batch=64, unit="images", decay=0.5).facts


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"steps": 9, "decay": 0.9, "half_life": 3.0},
        {"steps": 9, "decay": 1.1},
        {"steps": 9, "half_life": 0.0},
        {"steps": 9, "sigma_rel": 0.5},
        {"steps": 9, "batch": 3.0},
        {"steps": 9, "unit": "tokens"},
        {"steps": 9, "unit": "tokens", "batch": 0.0},
        {"steps": 9, "unit": "epochs", "batch": 3.0},
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        advise(**arguments)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decays_at_the_ends_are_json(decay: float) -> None:
    report = advise(steps=20, decay=decay)
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.ok == (decay == 0.0)


def test_a_run_of_any_length() -> None:
    """No loop over its steps."""
    assert advise(steps=10**12).ok and not advise(steps=10**12, half_life=1e12).ok


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--steps", "10000"]) == 0
    text = capsys.readouterr().out
    assert "schedule:        half_life:500" in text and "warmup:0.9999" in text
    assert main(["advise", "--steps", "300", "--decay", "0.9999", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["facts"]["seed_weight"] == pytest.approx(0.97, 1e-2)
    assert main(["advise", "--steps", "300", "--decay", "2"]) == 2


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "decay.png"
    assert advise(steps=50, sigma_rel=0.1, plot=path).facts["plot"] == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="at most 2,000,000 steps"):
        advise(steps=10**9, plot=path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        advise(steps=50, plot=path)
