"""A run that is told to stop: by a signal to one of its processes, in the midst of training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.launch.programs import (
    AVERAGE,
    LAUNCH,
    TIMEOUT,
    TINY,
    average_of,
    environment,
    finished,
    torchrun,
    weights_of,
)

pytestmark = pytest.mark.dist

STEPS = "100000"  # more than are made in the time of a test
OFTEN = ("--save-every", "1000000", "--eval-every", "1000000")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()]


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until training is on its way; nothing is asked of how long that takes."""
    while not ready():
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended too early: {process.communicate()[1][-3000:]}")


def test_a_signal_to_one_rank_saves_all_and_ends_well(folder: Path, corpus: Path) -> None:
    out = folder / "told"
    flags = (*TINY, "--data", corpus, "--out", out, *AVERAGE, *OFTEN, "--steps", STEPS)
    flags += ("--workers", "1")
    command = [sys.executable, *torchrun(2), str(LAUNCH / "train.py"), *map(str, flags)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        rows = out / "metrics.jsonl"
        wait_until(lambda: rows.is_file() and rows.read_text().count("\n") >= 5, process)
        workers = children(process.pid)
        assert len(workers) == 2
        (reader,) = children(workers[1])
        os.kill(reader, signal.SIGUSR1)  # as a scheduler does, which signals all it finds
        os.kill(workers[1], signal.SIGUSR1)
        text, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err[-3000:]

    stopped = int((out / "preempted").read_text())
    checkpoint = out / "checkpoints" / f"step_{stopped:06d}"
    assert stopped >= 5 and f"preempted  {checkpoint} is complete" in text
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] == stopped
    assert (out / "checkpoints" / "latest").read_text().strip() == checkpoint.name
    assert not (out / "summary.json").exists(), "it has not come to its end"

    # What was saved is what goes on, on another number of ranks.
    end = str(stopped + 1)
    flags = (*AVERAGE, "--steps", end, "--resume", "auto", "--ema-update-every", "1000000")
    run = finished(folder, "told", corpus, None, *flags)
    assert f"at step {stopped}" in run.line("resume ")
    assert not (out / "preempted").exists()
    before, after = average_of(checkpoint), average_of(run.checkpoint(stopped + 1))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert weights_of(checkpoint).keys() == weights_of(run.checkpoint(stopped + 1)).keys()
