"""Where the runs of a module write, the text they train on, and flags that are refused."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.programs import LAUNCH

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
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    """Some text with a little structure to learn, the same in every session."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(80)]
    path = folder / "corpus"
    path.mkdir()
    for number in range(3):
        text = " ".join(draw.choice(words) for _ in range(9000))
        (path / f"{number}.txt").write_text(text)
    return path


@pytest.fixture
def usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The error line that the training program has for some flags.

    In this process: the whole program takes five seconds to come to its flags.
    """
    monkeypatch.syspath_prepend(LAUNCH)
    options: Any = importlib.import_module("options")

    def refused(flags: list[str], ranks: int | None = None) -> str:
        for name, value in {"RANK": "0", "WORLD_SIZE": str(ranks)}.items():
            if ranks is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            options.parse_options(flags)
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        return line

    return refused
