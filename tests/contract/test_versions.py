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
    required = project["dependencies"] + project["optional-dependencies"]["train"]
    bounds = dict(entry.split(">=") for entry in required)
    oldest = pinned("constraints-oldest.txt")
    assert bounds == {name: oldest[name] for name in bounds}
    assert all(number(pinned("constraints.txt")[name]) > number(oldest[name]) for name in bounds)


def test_one_version_everywhere() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_what_trains_brings_pytorch_and_the_rest_does_not() -> None:
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    whole = tomllib.loads((ROOT / "distributions/sharded-ema/pyproject.toml").read_text())
    thin = whole["project"]
    assert (core["name"], thin["name"]) == ("sharded-ema-core", "sharded-ema")
    assert not any(entry.startswith("torch") for entry in core["dependencies"])
    assert any(e.startswith("torch>") for e in core["optional-dependencies"]["train"])
    assert thin["version"] == __version__ and "scripts" not in thin
    assert thin["dependencies"] == [f"sharded-ema-core[train]=={__version__}"]
    for extra, required in thin["optional-dependencies"].items():
        assert required == [f"sharded-ema-core[{extra}]=={__version__}"]
        assert "sharded-ema-core[train]" in core["optional-dependencies"][extra]


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
