"""The checkpoints of a run are the same ones for everybody who asks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sharded_ema import inspect, latest_checkpoint, watch
from sharded_ema.checkpoint.files import OpenFiles
from sharded_ema.checkpoint.names import SET_ASIDE_MARK, TEMPORARY_MARK, new_uuid
from sharded_ema.checkpoint.removal import remove_outdated
from sharded_ema.checkpoint.run import committed, committed_at
from sharded_ema.tools.snapshots import find_snapshots
from tests.helpers.checkpoints import make, meta


def checkpoint(path: Path, step: int) -> Path:
    said = {"": meta(step=step, run="f" * 32)}
    return make(path, {"ema.w": np.ones(3, "f4")}, metas=said, uuid=f"{step:032x}")


def found_by(run: Path, out: Path) -> dict[str, list[int]]:
    """The steps that each of them finds."""
    with OpenFiles() as files:
        snapshots = [snapshot.step for snapshot in find_snapshots(run, files)]
    return {
        "inspect": [row["step"] for row in inspect(run).facts["checkpoints"]],
        "snapshots": snapshots,
        "watch": [r.facts["step"] for r in watch(run, out, keep=99, once=True) if r.ok],
    }


@pytest.mark.parametrize("place", ["step_{}", "step_{}/ema", "checkpoints/step_{}/ema"])
def test_one_definition(tmp_path: Path, place: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (1, 2, 3):
        checkpoint(run / place.format(step), step)
    # On another disk, by a link of the checkpoint or of the directory that holds it.
    checkpoint(elsewhere / place.format(4), 4)
    (run / place.format(4)).parent.mkdir(exist_ok=True)
    (run / place.format(4)).symlink_to(elsewhere / place.format(4))
    checkpoint(elsewhere / "step_5" / "ema", 5)
    (run / "step_5").symlink_to(elsewhere / "step_5")
    # What is there already, by another name; and what is none.
    (run / "a_link").symlink_to((run / place.format(3)).parent if "ema" in place else "step_3")
    (run / "ema").symlink_to(os.path.relpath(run / place.format(3), run))
    for mark in (TEMPORARY_MARK, SET_ASIDE_MARK):
        checkpoint(run / f"step_6{mark}{new_uuid()}", 6)
    assert set(map(tuple, found_by(run, tmp_path / "out").values())) == {(1, 2, 3, 4, 5)}
    assert latest_checkpoint(run) == run / "step_5" / "ema"
    assert {row["name"] for row in inspect(run).facts["checkpoints"]} == {
        f"step_{step}" for step in range(1, 6)
    }


def test_links_are_no_checkpoints_to_remove(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        checkpoint(run / f"step_{step}", step)
    checkpoint(tmp_path / "elsewhere" / "step_0", 0)
    (run / "step_0").symlink_to(tmp_path / "elsewhere" / "step_0")
    (run / "step_4").symlink_to("step_3")
    assert [c.step for c in committed(run)] == [0, 1, 2, 3]
    newest = committed_at(run / "step_3")
    assert newest is not None
    remove_outdated(newest, 2)
    assert {path.name for path in run.iterdir()} == {"step_0", "step_2", "step_3", "step_4"}
    assert committed_at(tmp_path / "elsewhere" / "step_0") is not None
