"""The metrics of a run, and who has them under which names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.programs import LAUNCH

# In a process of its own: Weights & Biases stays in the one that it is imported into. The rows come
# by its input, since the command line is noted there too.
RECORD = """
import json, sys
from pathlib import Path
from training.recording import Recorder, read_rows

recorder = Recorder(Path(sys.argv[1]), 0, {"seed": 17})
for row in json.load(sys.stdin):
    recorder.add(row)
recorder.close()
"""


def test_all_boards_have_the_same_names(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    rows = [{"step": step, "train_loss": 3.5 / step, "ema_loss/ema": 4.0} for step in (1, 2)]
    environment = {**os.environ, "PYTHONPATH": str(LAUNCH)}
    environment.pop("WANDB_MODE", None)
    command = [sys.executable, "-W", "error", "-c", RECORD, str(tmp_path)]
    done = subprocess.run(
        command,
        env=environment,
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    (there,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (events,) = (tmp_path / "tensorboard").iterdir()
    for name in ("train_loss", "ema_loss/ema"):
        assert name.encode() in there.read_bytes() and name.encode() in events.read_bytes()
    assert b"seed" in there.read_bytes()


def test_what_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    from training.flags import parse_options

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        parse_options(["--parallel", "none", "--wandb"])
    assert "pip install wandb" in capsys.readouterr().err
