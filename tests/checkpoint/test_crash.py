"""Saves that are killed at every step: the last committed checkpoint is never lost or altered."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharded_ema.checkpoint.run import committed
from sharded_ema.tools.consolidate import consolidate
from tests.helpers.crash import race, stress


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    counts = stress(tmp_path, 20, seed=1)
    assert counts["killed"] >= 15 and counts["survivors"] >= 1


def test_two_jobs_that_save_to_one_path(tmp_path: Path) -> None:
    """One of them wins, the other is told; what is there is wholly the winner's."""
    run = tmp_path / "run"
    first, second = race(run, 20)
    steps = {c.path.name: c.step for c in committed(run)}
    assert len(steps) == 20
    for number, both in enumerate(zip(first, second, strict=True)):
        assert sorted(both) == ["CheckpointExistsError", "saved"]
        assert steps[f"step_{number}"] == 100 * both.index("saved") + number
        assert consolidate(run / f"step_{number}", tmp_path / str(number), progress=False).ok
    assert {path.name for path in run.iterdir()} == {*steps, "latest"}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_call_and_random_moments(tmp_path: Path) -> None:
    counts = stress(tmp_path, 400, seed=2)
    assert counts["killed"] >= 200
