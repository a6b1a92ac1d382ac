"""The examples of teachers, run small on two ranks: what they learn, and what the average does."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.launch.programs import ROOT, execute, torchrun

pytestmark = [pytest.mark.dist, pytest.mark.slow]

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None,
    reason="the digits come with pip install '.[examples]'",
)


def numbers(example: str, steps: int, *flags: str) -> list[dict[str, float]]:
    """The numbers of each line that it prints, by the word before them."""
    program = ROOT / "examples" / example
    done = execute(*torchrun(2), program, "--steps", str(steps), *flags).good()
    return [
        {name: float(value) for name, value in re.findall(r"(\w+) (-?\d+\.\d+)", line)}
        for line in done.out.splitlines()
    ]


@needs_digits
def test_self_distillation_makes_features() -> None:
    (found,) = numbers("dino_digits.py", 120)
    assert min(found["student"], found["teacher"]) > found["untrained"] + 0.01


@needs_digits
def test_thirty_labels_teach_most_digits() -> None:
    (found,) = numbers("mean_teacher.py", 100)
    assert min(found["student"], found["teacher"]) > 0.7  # chance: 0.1


def test_the_target_stands_longer_than_a_fall_takes() -> None:
    (found,) = numbers("target_network.py", 500)
    assert min(found["network"], found["target"]) > 120  # untrained: 91


def test_a_reference_remembers_what_the_student_forgets() -> None:
    old, new = numbers("moving_reference.py", 100)
    assert old["reference"] < old["student"], "the old text"
    assert new["student"] < 1 and new["reference"] < 1, "the new one; untrained 3.3"
    assert 0 < old["KL"] < 1
