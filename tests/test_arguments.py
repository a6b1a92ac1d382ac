"""The calls take what people have at hand, and refuse by name what only looks like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sharded_ema import (
    ShardedEMA,
    advise,
    average,
    consolidate,
    diff,
    inspect,
    latest_checkpoint,
    synthesize,
    verify,
    watch,
)
from sharded_ema.config import as_whole
from sharded_ema.errors import ConfigError


class Place:
    """A path that is no ``Path``, and whose text is not its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.fixture
def ema() -> ShardedEMA:
    return ShardedEMA(nn.Linear(3, 2), "power:0.1")


@pytest.mark.parametrize("step", [7, np.int64(7), np.uint8(7), torch.tensor(7)], ids=repr)
def test_whole_numbers(ema: ShardedEMA, tmp_path: Path, step: Any) -> None:
    ema.save(tmp_path / "run" / "c", step=step, keep_last=step)
    loaded = ema.load(tmp_path / "run" / "c")
    assert loaded == 7 and type(loaded) is int
    assert type(as_whole(step, "step")) is int
    assert next(watch(tmp_path / "run", tmp_path / "out", keep=step, once=True)).ok
    assert consolidate(tmp_path / "run" / "c", tmp_path / "x", jobs=step, progress=False).ok
    assert advise(steps=step, decay=0.1).facts["seed_weight"] < 1
    made = ShardedEMA(nn.Linear(3, 2), update_every=step, start_step=step, total_steps=20 * step)
    made.save(tmp_path / "other", step=1)


WRONG = [True, np.True_, torch.tensor(True), -1, np.int64(-1), 7.0, np.float32(7), "7"]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_number_of_steps(ema: ShardedEMA, tmp_path: Path, wrong: Any) -> None:
    for call in (
        lambda: ema.save(tmp_path / "c", step=wrong),
        lambda: ema.save(tmp_path / "c", step=1, keep_last=wrong),
        lambda: ShardedEMA(nn.Linear(3, 2), update_every=wrong),
        lambda: ShardedEMA(nn.Linear(3, 2), start_step=wrong),
        lambda: advise(steps=wrong),
        lambda: synthesize(tmp_path, sigma_rel=0.1, out=tmp_path / "out", step=wrong),
        lambda: consolidate(tmp_path, tmp_path / "out", jobs=wrong),
        lambda: watch(tmp_path, tmp_path / "out", keep=wrong),
    ):
        with pytest.raises(ConfigError, match=r"must (be an int|be at least|not be neg)"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [True, -1, 2.0], ids=repr)
def test_counts_of_other_averages(ema: ShardedEMA, tmp_path: Path, wrong: Any) -> None:
    torch.save({name: tensor * 2 for name, tensor in nn.Linear(3, 2).state_dict().items()},
               tmp_path / "other.pt")  # fmt: skip
    with pytest.raises(ConfigError, match="num_updates"):
        ema.load(tmp_path / "other.pt", num_updates=wrong)
    assert ema.load(tmp_path / "other.pt", num_updates=np.int64(4)) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype", [torch.float16, "float16", "torch.float16", np.float16, np.dtype("float16")], ids=repr
)
def test_dtypes(ema: ShardedEMA, tmp_path: Path, dtype: Any) -> None:
    assert {t.dtype for t in ema.full_state_dict(dtype=dtype).values()} == {torch.float16}
    made = ShardedEMA(nn.Linear(3, 2), 0.5, shadow_dtype=dtype)
    assert {t.dtype for t in made.full_state_dict().values()} == {torch.float16}
    ema.save(tmp_path / "run" / "c", step=1)
    assert consolidate(tmp_path / "run" / "c", tmp_path / "x", dtype=dtype, progress=False).ok
    for _ in range(2):
        (report,) = [*watch(tmp_path / "run", tmp_path / "served", dtype=dtype, once=True)] or [
            None
        ]
        assert report is None or report.ok
    for out in ("x", "served/c"):
        stored = load_file(tmp_path / out / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.float16}


@pytest.mark.parametrize("wrong", ["half", "int", float, "no_such", torch.nn, 16], ids=repr)
def test_what_is_no_dtype(ema: ShardedEMA, tmp_path: Path, wrong: Any) -> None:
    ema.save(tmp_path / "c", step=1)
    with pytest.raises(ConfigError, match="dtype must be one of"):
        consolidate(tmp_path / "c", tmp_path / "x", dtype=wrong, progress=False)
    if wrong not in ("half", "int", float):  # names that PyTorch has as well
        with pytest.raises(ConfigError, match="shadow_dtype must be a dtype"):
            ShardedEMA(nn.Linear(3, 2), shadow_dtype=wrong)


def test_paths(ema: ShardedEMA, tmp_path: Path) -> None:
    run, a = Place(tmp_path / "run"), Place(tmp_path / "run" / "a")
    ema.save(a, step=1)
    assert ema.load(a) == 1
    for report in (inspect(a), inspect(run), verify(a, model=None), diff(a, a)):
        assert report.ok and str(tmp_path / "run") in report.path
    report = consolidate(a, Place(tmp_path / "out"), progress=False)
    assert report.ok and report.path == str(a.path)
    for report in (
        consolidate(a, Place(tmp_path / "like"), like=Place(tmp_path / "out"), progress=False),
        average([a, a], out=Place(tmp_path / "mean"), progress=False),
        *watch(run, Place(tmp_path / "served"), once=True),
    ):
        assert report.ok and "object at" not in report.text()
    assert latest_checkpoint(run) == a.path
