"""The examples of sharded training, run small: the average wins, and a second start goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.programs import ROOT, Finished, execute, needs_deepspeed, torchrun

pytestmark = pytest.mark.dist

SMALL = ("--steps", "300", "--save-every", "200")
ON_CPUS = {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore::FutureWarning"}


def start(example: str, ranks: int, out: Path) -> Finished:
    program = ROOT / "examples" / example
    return execute(*torchrun(ranks), program, *SMALL, "--out", out, add=ON_CPUS).good()


def losses(done: Finished) -> tuple[float, float]:
    """Of the weights and of the average."""
    (found,) = re.findall(r"held out: raw (\S+)  average (\S+)", done.out)
    return float(found[0]), float(found[1])


def exported(done: Finished, out: Path) -> Path:
    """The model that the command in the last line makes."""
    (command,) = re.findall(r"sharded-ema (consolidate \S+) export", done.out)
    execute("-m", "sharded_ema", *command.split(), out / "export", "--no-progress").good()
    return out / "export" / "model.safetensors"


def test_fsdp2_and_again_on_one_rank(tmp_path: Path) -> None:
    first = start("fsdp2.py", 2, tmp_path)
    assert "from step 0" in first.out
    raw, average = losses(first)
    assert average < raw
    assert exported(first, tmp_path).is_file()
    again = start("fsdp2.py", 1, tmp_path)
    assert "from step 300" in again.out
    assert losses(again) == pytest.approx((raw, average), abs=2e-4)


@needs_deepspeed
def test_deepspeed_and_again(tmp_path: Path) -> None:
    first = start("zero.py", 2, tmp_path)
    assert "from step 0" in first.out
    raw, average = losses(first)
    assert average < raw
    assert exported(first, tmp_path).is_file()
    again = start("zero.py", 2, tmp_path)
    assert "from step 300" in again.out
    assert losses(again) == (raw, average)
