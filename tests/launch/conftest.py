"""What the tests of the training program share: the text, a run of one process, and its modules."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.launch.programs import AVERAGE, Check, Finished, TrainingRun, finished

NEEDS = (2, 11)  # as the extra "train" says


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip what trains where PyTorch trains otherwise."""
    if tuple(map(int, torch.__version__.split(".")[:2])) >= NEEDS:
        return
    reason = (
        "launch/ needs PyTorch 2.11: with gloo, fully_shard of 2.8 sums gradients over the ranks"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of a module write."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text with a little structure to learn, the same in every session."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(80)]
    path = tmp_path_factory.mktemp("text") / "corpus"
    path.mkdir()
    for number in range(3):
        text = " ".join(draw.choice(words) for _ in range(9000))
        (path / f"{number}.txt").write_text(text)
    return path


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> TrainingRun:
    """One process: the losses that there should be."""
    folder = tmp_path_factory.mktemp("alone")
    return finished(folder, "none", corpus, None, "--parallel", "none", *AVERAGE)


@pytest.fixture
def check_here(capsys: pytest.CaptureFixture[str]) -> Check:
    """``programs.check_export`` in this process: a fresh one takes five seconds to begin."""
    from check_export import main

    def check(export: Path, run: TrainingRun) -> Finished:
        capsys.readouterr()
        code = main([str(export), str(run.out), "--sample-tokens", "4"])
        return Finished(code, *capsys.readouterr())

    return check


@pytest.fixture
def usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The error line that the training program has for some flags.

    In this process: the whole program takes five seconds to come to its flags.
    """
    from training.flags import parse_options

    def refused(flags: list[str], ranks: int | None = None) -> str:
        for name, value in {"RANK": "0", "WORLD_SIZE": str(ranks)}.items():
            if ranks is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            parse_options(flags)
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        return line

    return refused
