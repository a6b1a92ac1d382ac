"""The lower bounds of the dependencies are versions that the tests run on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from sharded_ema.version import __version__

ROOT = Path(__file__).parents[2]


def pinned(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text()
    return dict(line.split("==") for line in text.splitlines() if "==" in line)


def test_lower_bounds_are_the_oldest_versions_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(entry.split(">=") for entry in project["dependencies"])
    oldest = pinned("constraints-oldest.txt")
    assert bounds == {name: oldest[name] for name in bounds}
    assert all(number(pinned("constraints.txt")[name]) > number(oldest[name]) for name in bounds)


def test_one_version_everywhere() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
