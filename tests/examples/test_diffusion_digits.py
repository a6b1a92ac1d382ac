"""The diffusion model of digits, run small: it learns, and its averages are better than it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "diffusion_digits.py"


@pytest.fixture
def example() -> ModuleType:
    pytest.importorskip("sklearn", reason="the digits come with pip install '.[examples]'")
    spec = importlib.util.spec_from_file_location("diffusion_digits", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_run_small_and_again(example: ModuleType, tmp_path: Path) -> None:
    small = ["--steps", "600", "--samples", "300", "--width", "96", "--out", str(tmp_path)]
    found = example.main(small)
    best = min(distance for name, distance in found.items() if name.startswith("power"))
    assert best < found["raw"] and found["constant decay"] < found["raw"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert example.main(small) == found, "in the same directory, with the same result"


def test_the_distance_is_that_of_gaussians(example: ModuleType) -> None:
    """Between N(m, a) and N(0, b) with diagonal covariances: |m|^2 + sum (sqrt(a) - sqrt(b))^2."""
    critic = example.Critic.__new__(example.Critic)
    a, b, mean = (torch.rand(32, dtype=torch.float64) + 0.5 for _ in range(3))
    critic.real = (torch.zeros(32, dtype=torch.float64), b.diag())
    critic.moments = lambda images: (mean, a.diag())
    expected = (mean.square() + (a.sqrt() - b.sqrt()).square()).sum()
    assert critic.distance(torch.zeros(1)) == pytest.approx(float(expected))
