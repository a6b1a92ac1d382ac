"""What ``inspect`` says of a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save_file

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError
from sharded_ema.model.layout import Box
from sharded_ema.tools.inspection import inspect
from tests.helpers.checkpoints import (
    Chunking,
    flip,
    grid,
    make,
    meta,
    meta_bytes,
    ranges,
    rows,
    whole,
)


def test_what_is_in_it(tmp_path: Path) -> None:
    profiles = {
        "fast": {"schedule": {"type": "Constant", "decay": 0.9}, "decay": 0.9, "seed_weight": 0.0},
        "slow": {"schedule": {"type": "HalfLife", "steps": 7}, "decay": 0.99, "seed_weight": 0.5},
    }
    tensors = {"fast.w": np.zeros((3, 4), "f4"), "slow.w": np.zeros((3, 4), "f4")}
    said = meta(profiles=profiles, step=4321, num_updates=1234)
    report = inspect(make(tmp_path / "c", tensors, rows(3), metas={"": said}))
    text = report.text()
    assert report.ok
    for fact in ("fast", "slow", "HalfLife", "0.9", "4,321", "1,234", "safetensors", "verified"):
        assert fact in text
    facts = json.dumps(report.to_dict())
    assert '"horizon_steps": 10.0' in facts.replace("10.000000000000002", "10.0")
    assert '"parameters": 12' in facts and '"bytes": 48' in facts
    assert '"torch": "0"' in facts and '"world_size": 3' in facts


def test_data_is_not_read(tmp_path: Path) -> None:
    path = make(tmp_path / "c", {"ema.w": np.zeros(100, "f4")})
    flip(path / "shard-00000.safetensors", 4096)
    assert inspect(path).ok
    flip(path / "shard-00000.safetensors", 100)
    with pytest.raises(CheckpointCorruptError):
        inspect(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_foreign_checkpoint_is_unverified(tmp_path: Path) -> None:
    state = {"ema.w": torch.ones(3), "_meta": torch.from_numpy(meta_bytes().copy())}
    dcp.save({"model": {"w": torch.ones(3)}, "ema": state}, checkpoint_id=tmp_path, no_dist=True)
    assert inspect(tmp_path).facts["metadata"] == "unverified"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        inspect(tmp_path / "c")


def profile(now: float, **schedule: object) -> dict[str, object]:
    return {"schedule": schedule, "decay": now, "seed_weight": 0.0}


def test_how_long_an_average_remembers(tmp_path: Path) -> None:
    profiles = {
        "constant": profile(0.999, type="Constant", decay=0.999),
        "half": profile(2 ** (-1 / 7), type="HalfLife", steps=7),
        "power": profile(0.9, type="Power", gamma=6.94, sigma_rel=None),
        "frozen": profile(1.0, type="Constant", decay=1.0),
        "copy": profile(0.0, type="Constant", decay=0.0),
        "later": profile(0.5, type="OfALaterVersion"),
    }
    path = make(tmp_path / "c", {"half.w": np.zeros(3, "f4")}, metas={"": meta(profiles=profiles)})
    (said,) = inspect(path).facts["averages"]
    spans = {profile["name"]: profile for profile in said["profiles"]}
    assert spans["constant"]["horizon_steps"] == pytest.approx(1000)
    assert spans["constant"]["half_life_steps"] == pytest.approx(692.8, abs=0.1)
    assert spans["half"]["half_life_steps"] == pytest.approx(7)
    # Karras et al. give gamma 6.94 for 0.1.
    assert spans["power"]["schedule"] == {
        "type": "Power",
        "gamma": 6.94,
        "sigma_rel": pytest.approx(0.0999723, abs=1e-6),
    }
    assert "Power(gamma=6.94, sigma_rel=0.0999723)" in inspect(path).text()
    assert spans["frozen"]["horizon_steps"] is None and spans["copy"]["horizon_steps"] == 1
    assert spans["later"]["schedule"] == {"type": "OfALaterVersion"}
    json.dumps(inspect(path).to_dict(), allow_nan=False)


def test_counters_and_what_is_not_averaged(tmp_path: Path) -> None:
    tensors = {"ema.w": np.zeros((3, 4), "f4"), "_frozen.f": np.zeros(5, "f4"),
               "_buffers.n": np.zeros((), "i8")}  # fmt: skip
    said = meta(
        applied_steps=107, last_lerp_step=100, num_updates=95, update_every=10, start_step=12,
        seed_step=12, aliases={"w": ["head.w"]}, absent={"count": 1, "names": ["skipped.w"]},
        nonfinite_elements=3, sampled_distance={"ema": 0.25},
    )  # fmt: skip
    report = inspect(make(tmp_path / "c", tensors, metas={"": said}))
    (facts,) = report.facts["averages"]
    assert facts["steps_in_open_window"] == 7 and facts["applied_steps"] == 107
    assert (facts["update_every"], facts["start_step"], facts["seed_step"]) == (10, 12, 12)
    assert facts["frozen"] == {"policy": "save", "tensors": 1, "parameters": 5, "bytes": 20}
    assert facts["buffers"] == {"policy": "copy", "tensors": 1, "parameters": 1, "bytes": 8}
    assert facts["nonfinite_elements_skipped"] == 3
    assert facts["profiles"][0]["sampled_distance_to_live_weights"] == 0.25
    assert "head.w" in report.text() and "skipped.w" in report.text()


@pytest.mark.parametrize(
    "chunking, layout, chunks",
    [(whole, "whole", 1), (rows(3), "rows", 2), (grid, "blocks", 4), (ranges(3), "ranges", 6),
     (lambda _: [[Box((0, 0), (4, 1))], [Box((0, 1), (4, 4))]], "columns", 2)],
)  # fmt: skip
def test_layouts(tmp_path: Path, chunking: Chunking, layout: str, chunks: int) -> None:
    tensors = {"ema.w": np.zeros((4, 5), "f4")}
    report = inspect(make(tmp_path / "c", tensors, chunking), tensors=True)
    row = next(row for row in report.facts["list"] if row["name"] == "ema.w")
    assert (row["layout"], row["chunks"], row["bytes"]) == (layout, chunks, 80)
    assert report.facts["layouts"] == dict(Counter([layout, "whole"]))
    assert report.facts["chunks"] == chunks + 1
    lines = [line.split() for line in report.text().splitlines()]
    assert ["ema.w", "F32", "[4,", "5]", "80", "B", str(chunks), layout] in lines


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(3)}, "optim": {"a": torch.ones(2), "b": torch.ones(2)},
             "c": torch.ones(1, dtype=torch.complex32)}  # fmt: skip
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    report = inspect(tmp_path)
    assert report.ok and report.facts["metadata"] == "unverified"
    assert report.facts["parts"] == {
        "model": {"tensors": 1, "parameters": 3, "bytes": 12},
        "optim": {"tensors": 2, "parameters": 4, "bytes": 16},
    }
    for said in ("not written by this library", "no average", "not read, such as c"):
        assert any(said in note for note in report.notes)


def test_a_model_says_whether_it_is_an_average(tmp_path: Path) -> None:
    said = {"": meta(step=7)}
    source = make(tmp_path / "c", {"ema.w": np.zeros((3, 4), "f4")}, rows(2), metas=said)
    consolidate(source, tmp_path / "m", progress=False)
    report = inspect(tmp_path / "m", tensors=True)
    assert report.facts["header"].items() >= {"kind": "ema", "step": "7", "decay": "0.999"}.items()
    assert report.facts["metadata"] == "unverified" and not report.notes
    assert re.search(r"\n +w +F32 +\[3, 4\] ", report.text())
    save_file({"w": np.zeros(3, "f4")}, tmp_path / "raw.safetensors")
    assert "do not say whether" in inspect(tmp_path / "raw.safetensors").text()


# ---------------------------------------------------------------------- a run


def test_a_run(tmp_path: Path) -> None:
    for step in (1, 2):
        ema = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
        ema.save(tmp_path / f"step_{step}", step=step)
        ema.close()
    (tmp_path / "latest").write_text("step_1\n")
    (tmp_path / "other").mkdir()
    unfinished = {f"step_3.tmp-{uuid4().hex}", "step_4", f"step_2.old-{uuid4().hex}"}
    for name in unfinished:
        shutil.copytree(tmp_path / "step_2", tmp_path / name)
    (tmp_path / "step_4" / "manifest.json").unlink()
    report = inspect(tmp_path)
    assert report.ok and set(report.facts["uncommitted"]) == unfinished
    first, second = report.facts["checkpoints"]
    assert (first["name"], first["step"], first["latest"]) == ("step_1", 1, True)
    assert (second["name"], second["step"], second["latest"]) == ("step_2", 2, False)
    manifest = json.loads((tmp_path / "step_2" / "manifest.json").read_text())
    when = datetime.fromisoformat(second["saved_at"]).timestamp()
    assert when == manifest["saved_at"] // 1000
    assert second["bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "step_2").iterdir() if p.name != "manifest.json"
    )
    assert any("latest names step_1, the last committed is step_2" in n for n in report.notes)
    flip(tmp_path / "step_1" / "manifest.json", 30)
    report = inspect(tmp_path)
    assert not report.ok and "step_1" in report.problems[0]
    assert len(report.facts["checkpoints"]) == 1


def test_a_run_of_the_training_program(tmp_path: Path) -> None:
    for step in (1, 2):
        path = make(tmp_path / "checkpoints" / f"step_{step}" / "ema", {"ema.w": np.zeros(3, "f4")},
                    metas={"": meta(step=step)}, uuid=f"{step}" * 32)  # fmt: skip
    shutil.copytree(path, path.with_name(f"ema.tmp-{uuid4().hex}"))
    (tmp_path / "checkpoints" / "latest").write_text("step_2\n")
    report = inspect(tmp_path)
    assert [(c["name"], c["latest"]) for c in report.facts["checkpoints"]] == [
        ("step_1", False),
        ("step_2", True),
    ]
    assert report.facts["checkpoints"][0]["saved_at"] is None  # was not recorded
    (unfinished,) = report.facts["uncommitted"]
    assert unfinished.startswith("checkpoints/step_2/ema.tmp-")
