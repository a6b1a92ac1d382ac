"""The page on adding a framework is a framework: its code is taken from there and run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sharded_ema import ShardedEMA
from sharded_ema.model import sources
from tests.helpers.layouts import rank, world
from tests.helpers.pool import WorkerPool

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


def toy() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found: dict[str, Any] = {"__name__": "toy"}
    exec(compile(code, str(PAGE), "exec"), found)
    return SimpleNamespace(**found)


def rows(index: int) -> torch.Tensor:
    return torch.arange(15.0).view(5, 3) * (index + 1)


def average_and_save(path: str) -> None:
    """Five rows on two ranks, so the blocks are uneven."""
    framework = toy()
    sources.FRAMEWORKS.insert(0, framework)
    try:
        model = nn.Sequential(framework.RowParallel(rows(0)))
        ema = ShardedEMA(model, 0.75)
        expected = rows(0)
        first, last = rank() * 5 // world(), (rank() + 1) * 5 // world()
        assert ema.memory["ideal"] == 4 * 3 * (last - first)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        ema.attach(optimizer)
        optimizer.step()  # with the weights that it was made of
        for index in range(1, 4):
            weight = model[0].weight
            weight.grad = weight.detach() - rows(index)[first:last]
            optimizer.step()
            expected.lerp_(rows(index), 0.25)
        with ema.swap():
            assert torch.equal(model[0].weight, expected[first:last])
        assert torch.equal(model[0].weight, rows(3)[first:last])
        ema.save(path, step=3)
        ema.close()
    finally:
        sources.FRAMEWORKS.remove(framework)


def test_the_framework_on_the_page(worlds: dict[int, WorkerPool], tmp_path: Path) -> None:
    worlds[2].run(average_and_save, str(tmp_path / "toy"))
    plain = nn.Sequential(nn.Linear(3, 5, bias=False))
    ema = ShardedEMA(plain, 0.75)
    assert ema.load(tmp_path / "toy") == 3
    expected = rows(0)
    for index in range(1, 4):
        expected.lerp_(rows(index), 0.25)
    assert torch.equal(ema.state_dict()["ema.0.weight"], expected)
    ema.close()
