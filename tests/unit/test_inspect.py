"""What ``inspect`` says of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError
from sharded_ema.tools.summary import inspect
from tests.unit._make import flip, make, meta, meta_bytes, rows


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
    assert "metadata: unverified" in inspect(tmp_path).text()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        inspect(tmp_path / "c")
