"""A place where what the pages show is run as a newcomer would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def shell(tmp_path: Path, work: Path) -> Callable[[str], str]:
    """Runs lines in an empty directory where the commands of the README are on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, module in (
        ("python", ""),
        ("torchrun", "-m torch.distributed.run --standalone"),  # on a port that is free
        ("sharded-ema", "-m sharded_ema"),
    ):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        command.chmod(0o755)
    paths = os.pathsep.join([str(folder), os.environ["PATH"]])
    environment = {**os.environ, "PATH": paths, "OMP_NUM_THREADS": "1"}

    def run(lines: str) -> str:
        ended = subprocess.run(
            ["sh", "-e"], input=lines, cwd=work, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{lines}{ended.stdout}{ended.stderr}"
        return ended.stdout

    return run
