"""``average``: the mean of checkpoints of all kinds, against numpy's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.cli import main
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointExistsError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
)
from sharded_ema.tools.average import average
from tests.helpers.checkpoints import flip, grid, make, meta, ranges, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RANDOM = np.random.default_rng(3)
MODELS = [
    {"w": RANDOM.standard_normal((7, 6)).astype("f4"), "b": RANDOM.random(5, "f4")}
    for _ in range(3)
]
WEIGHTS = [1.0, 2.0, 5.0]


def ours(path: Path, number: int, **options: Any) -> Path:
    tensors = {f"ema.{name}": value for name, value in MODELS[number].items()}
    tensors |= {"_frozen.f": np.full(3, number, "f4"), "_buffers.n": np.array(number)}
    return make(path, tensors, (rows(2), grid, ranges(3))[number], **options)


def hub(path: Path, number: int) -> Path:
    path.mkdir()
    extra = {"f": np.full(3, number, "f4"), "n": np.array(number)}
    names = {"w": "one.safetensors", "b": "two.safetensors"}
    for name, file in names.items():
        save_file({name: MODELS[number][name]} | (extra if name == "b" else {}), path / file)
    names |= {"f": "two.safetensors", "n": "two.safetensors"}
    index = json.dumps({"weight_map": names})
    (path / "model.safetensors.index.json").write_text(index)
    (path / "config.json").write_text(f"config {number}")
    return path


def stock(path: Path, number: int) -> Path:
    state = {name: torch.from_numpy(value) for name, value in MODELS[number].items()}
    state |= {"f": torch.full((3,), float(number)), "n": torch.tensor(number)}
    dcp.save({"model": state, "other": torch.ones(4)}, checkpoint_id=path, no_dist=True)
    return path


def mean(checkpoints: list[Path], out: Path, **options: Any) -> Any:
    return average(checkpoints, out=out, progress=False, **options)


def wanted(name: str, weights: list[float]) -> np.ndarray:
    total = sum(w * m[name].astype("f8") for w, m in zip(weights, MODELS, strict=True))
    return (total / sum(weights)).astype("f4")


def near(found: np.ndarray, value: np.ndarray) -> bool:
    return bool((np.abs(found - value) <= np.spacing(np.abs(value))).all())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("kinds", [(ours, ours, ours), (hub, hub, hub), (hub, ours, hub)])
def test_mean(kinds: tuple, weights: list[float] | None, tmp_path: Path) -> None:
    inputs = [kind(tmp_path / str(i), i) for i, kind in enumerate(kinds)]
    report = mean(inputs, tmp_path / "out", weights=weights)
    assert report.ok
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("w", "b"):
        assert near(found[name], wanted(name, weights or [1.0] * 3)), name
    assert found["n"] == 2 and found["n"].dtype == np.int64
    shares = weights or [1.0] * 3
    if kinds[-1] is ours:
        assert np.array_equal(found["f"], np.full(3, 2, "f4")), "frozen: from the last"
    else:
        value = (shares[1] + 2 * shares[2]) / sum(shares)
        assert near(found["f"], np.full(3, value, "f4"))
        assert (tmp_path / "out" / "config.json").read_text() == "config 2"
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as opened:
        said = opened.metadata()
    assert said["kind"] == "average"
    assert json.loads(said["weights"]) == [s / sum(shares) for s in shares]


def test_models_of_a_dcp_checkpoint(tmp_path: Path) -> None:
    inputs = [stock(tmp_path / "a", 0), stock(tmp_path / "b", 1), hub(tmp_path / "c", 2)]
    assert mean(inputs, tmp_path / "out", prefix="model").ok
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {"w", "b", "f", "n"} and near(found["w"], wanted("w", [1, 1, 1]))
    with pytest.raises(CheckpointMismatchError, match="under the prefix 'x"):
        mean(inputs, tmp_path / "other", prefix="x")


def test_tied_weights_have_any_of_their_names(tmp_path: Path) -> None:
    said = {"": meta(aliases={"embed": ["head"]})}
    first = make(tmp_path / "a", {"ema.embed": np.zeros((3, 2), "f4")}, metas=said)
    second = tmp_path / "b.safetensors"
    save_file({"head": np.ones((3, 2), "f4")}, second)
    for inputs, expected in (([second, first], {"embed", "head"}), ([first, second], {"head"})):
        target = tmp_path / str(len(expected))
        assert mean(inputs, target).ok
        found = load_file(target / "model.safetensors")
        assert found.keys() == expected
        assert all((value == 0.5).all() for value in found.values())


def test_the_mean_is_rounded_once(tmp_path: Path) -> None:
    for number, value in enumerate((2 + 2.0**-7, 2.0**-39)):
        save_file({"w": np.array([value], "f4")}, tmp_path / f"{number}.safetensors")
    inputs = [tmp_path / f"{number}.safetensors" for number in range(2)]
    mean(inputs, tmp_path / "out", dtype="bfloat16")
    (found,) = load_torch(tmp_path / "out" / "model.safetensors")["w"].tolist()
    assert found == 1 + 2**-7, "in fp32 the mean is a tie, which would go to 1"


def test_one_checkpoint_keeps_its_bits(tmp_path: Path) -> None:
    special = np.array([np.nan, np.inf, -0.0, 1e-40], "f4")
    save_file({"w": special}, tmp_path / "one.safetensors")
    mean([tmp_path / "one.safetensors"], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tobytes() == special.tobytes()


def test_other_models_are_refused(tmp_path: Path) -> None:
    base = {"w": np.ones((2, 2), "f4"), "b": np.ones(3, "f4")}
    variants = {
        "lacks b": {"w": base["w"]},
        r"has \(4,\) as b": base | {"b": np.ones(4, "f4")},
        "has 1 tensors that": base | {"c": np.ones(1, "f4")},
        "b is I32": base | {"b": np.ones(3, "i4")},
    }
    save_file(base, tmp_path / "base.safetensors")
    for message, tensors in variants.items():
        save_file(tensors, tmp_path / "other.safetensors")
        inputs = [tmp_path / "other.safetensors", tmp_path / "base.safetensors"]
        with pytest.raises(CheckpointMismatchError, match=message):
            mean(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_use_and_damage_leave_nothing(tmp_path: Path) -> None:
    inputs = [ours(tmp_path / "a", 0), ours(tmp_path / "b", 1)]
    for weights in ([1.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ConfigError, match="weights"):
            mean(inputs, tmp_path / "out", weights=weights)
    for options in ({"jobs": 0}, {"dtype": "int8"}, {"max_shard_size": "x"}):
        with pytest.raises(ConfigError):
            mean(inputs, tmp_path / "out", **options)
    with pytest.raises(ConfigError):
        mean([], tmp_path / "out")
    with pytest.raises(CheckpointNotFoundError):
        mean([tmp_path / "missing"], tmp_path / "out")
    with pytest.raises(CheckpointMismatchError, match="no profile 'slow'"):
        mean(inputs, tmp_path / "out", profile="slow")
    with pytest.raises(CheckpointExistsError):
        mean(inputs, tmp_path)
    chunk = open_checkpoint(tmp_path / "a").tensors["ema.w"].chunks()[-1]
    flip(tmp_path / "a" / chunk.file, chunk.byte_offset)
    with pytest.raises(CheckpointCorruptError, match=r"ema\."):
        mean(inputs, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [str(ours(tmp_path / "a", 0)), str(hub(tmp_path / "b", 1))]
    command = ["average", *inputs, "--weights", "1,3", "--no-progress", "--json"]
    assert main([*command, "--out", str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["weights"] == [0.25, 0.75]
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == np.float16
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
