"""The README as a newcomer takes it: its script and commands run, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import support

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.dist
def test_script_and_commands(tmp_path: Path) -> None:
    (script,) = blocks("python")
    (tmp_path / "train.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("loss of the average") == 2
    commands = [
        line.partition("#")[0].split()
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("sharded-ema")
    ]
    assert len(commands) == 5
    for _, *arguments in commands:
        command = [sys.executable, "-m", "sharded_ema", *arguments]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    for exported in ("out", "served/latest"):
        assert (tmp_path / exported / "model.safetensors").is_file()


def test_begins_with_the_two_commands_that_exist() -> None:
    first = blocks("sh")[0].splitlines()
    assert README.startswith("```sh\n")
    makefile = (ROOT / "Makefile").read_text()
    for line, name in zip(first, ("train", "test"), strict=True):
        assert line.startswith(f"make {name} ")
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_to_files() -> None:
    for page in (
        README,
        (ROOT / "CONTRIBUTING.md").read_text(),
        (ROOT / "CHANGELOG.md").read_text(),
    ):
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), target


def test_the_tables_are_those_of_the_tests() -> None:
    listed = [mode for row in support.ROWS for mode in row.modes]
    assert sorted(listed) == sorted(support.worlds()), "every mode belongs to one row"
    assert support.table() in README, "bring it up to date: python -m tests.helpers.support"
    assert support.shares() in README, "bring it up to date: python -m tests.helpers.support"
