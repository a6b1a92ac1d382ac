"""``diff``: distances as numpy has them, names matched across all kinds of weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from sharded_ema.cli import main
from sharded_ema.errors import CheckpointCorruptError, CheckpointMismatchError, ConfigError
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.diff import diff
from sharded_ema.tools.report import Report
from tests.helpers.checkpoints import flip, grid, make, meta, ranges, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RANDOM = np.random.default_rng(0)
OLD = {"ema.a.w": RANDOM.random((7, 5), "f4"), "ema.b": RANDOM.random(9, "f4"),
       "_frozen.f": RANDOM.random((3, 3), "f4"), "_buffers.n": np.array(7)}  # fmt: skip
NEW = {key: value + RANDOM.random(value.shape).astype(value.dtype) for key, value in OLD.items()}


def bare(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.partition(".")[2]: value for key, value in tensors.items()}


def listed(report: Report) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report.facts["list"]}


def single(path: Path, **tensors: np.ndarray) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def test_distances_are_those_of_numpy(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", OLD, rows(3)), make(tmp_path / "b", NEW, ranges(4))
    report = diff(a, b, tensors=True)
    assert not report.ok
    found, apart, norm, differing = listed(report), 0.0, 0.0, 0
    for name, old in bare(OLD).items():
        old, new = old.astype("f8"), bare(NEW)[name].astype("f8")
        row = found.pop(name)
        assert row["relative_distance"] == pytest.approx(
            np.linalg.norm(old - new) / np.linalg.norm(new), rel=1e-12
        )
        assert row["largest_difference"] == np.abs(old - new).max(initial=0)
        assert row["differing_elements"] == (old != new).sum() and row["elements"] == old.size
        if name != "n":  # an integer
            apart, norm = apart + ((old - new) ** 2).sum(), norm + (new**2).sum()
        differing += (old != new).sum()
    assert not found
    assert report.facts["relative_distance"] == pytest.approx((apart / norm) ** 0.5, rel=1e-12)
    assert report.facts["differing_elements"] == differing


def test_the_same_weights_in_every_kind_of_file(tmp_path: Path) -> None:
    average = make(tmp_path / "c", OLD, grid)
    consolidate(average, tmp_path / "hf", max_shard_size=100, progress=False)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    save_file(bare(OLD), tmp_path / "one.safetensors")
    tensors = {name: torch.from_numpy(value.copy()) for name, value in bare(OLD).items()}
    dcp.save({"app": {"model": tensors}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    sides = [average, tmp_path / "hf", tmp_path / "one.safetensors", tmp_path / "dcp"]
    for a in sides:
        for b in sides:
            report = diff(a, b)
            assert report.ok and report.facts["equal_tensors"] == len(OLD), (a, b, report.text())


def test_one_bit(tmp_path: Path) -> None:
    last = OLD["ema.b"].copy()
    last[-1] = np.nextafter(last[-1], np.float32(2))
    a, b = make(tmp_path / "a", OLD), make(tmp_path / "b", {**OLD, "ema.b": last}, rows(2))
    report = diff(a, b)
    assert not report.ok and report.facts["differing_elements"] == 1
    assert report.facts["equal_tensors"] == len(OLD) - 1 and "most b" in report.text()
    assert diff(a, b, tolerance=1e-6).ok
    zeros = (
        single(tmp_path / "p", w=np.zeros(3, "f4")),
        single(tmp_path / "n", w=-np.zeros(3, "f4")),
    )
    assert not diff(*zeros).ok and diff(*zeros, tolerance=1e-9).ok


def test_the_tolerance_is_of_each_tensor(tmp_path: Path) -> None:
    large, small = np.ones(100_000, "f4"), np.ones(4, "f4")
    a = single(tmp_path / "a", large=large, small=small)
    b = single(tmp_path / "b", large=large, small=small * 2)
    assert diff(a, b).facts["relative_distance"] < 0.01
    assert not diff(a, b, tolerance=0.4).ok and diff(a, b, tolerance=0.5).ok
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="tolerance"):
            diff(a, b, tolerance=wrong)


def test_another_dtype_is_compared_by_value(tmp_path: Path) -> None:
    a = make(tmp_path / "a", OLD)
    consolidate(a, tmp_path / "half", dtype="bfloat16", progress=False)
    report = diff(a, tmp_path / "half", tensors=True)
    assert not report.ok and diff(a, tmp_path / "half", tolerance=2**-8).ok
    expected = torch.from_numpy(OLD["ema.b"]).bfloat16().double().numpy()
    row = listed(report)["b"]
    assert row["dtype"] == "F32/BF16"
    assert row["largest_difference"] == np.abs(OLD["ema.b"].astype("f8") - expected).max()
    exact = single(tmp_path / "f4", w=np.array([1.5, np.nan, np.inf], "f4"))
    wide = single(tmp_path / "f8", w=np.array([1.5, np.nan, np.inf], "f8"))
    assert diff(exact, wide).ok


def test_what_is_not_finite(tmp_path: Path) -> None:
    a = single(tmp_path / "a", w=np.array([1, np.nan, np.inf, 3], "f4"))
    b = single(tmp_path / "b", w=np.array([1, np.nan, np.inf, 4], "f4"))
    assert diff(a, a).ok
    facts = diff(a, b).facts
    assert facts["differing_elements"] == 1 and facts["largest_difference"] == 1
    assert facts["relative_distance"] == pytest.approx(1 / 17**0.5)
    c = single(tmp_path / "c", w=np.array([1, 2, np.inf, 3], "f4"))
    report = diff(a, c, tolerance=1e9)
    assert not report.ok and report.facts["relative_distance"] is None
    assert report.facts["largest_difference"] is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_names_of_one_side(tmp_path: Path) -> None:
    a = single(tmp_path / "a", x=np.ones(3, "f4"), y=np.ones(2, "f4"))
    b = single(tmp_path / "b", x=np.ones((3, 1), "f4"), z=np.ones(2, "f4"))
    report = diff(a, b, tolerance=1)
    assert not report.ok and len(report.problems) == 3
    assert report.facts["only_in_a"] == ["y"] and report.facts["only_in_b"] == ["z"]
    assert "x is F32 of shape [3] in" in report.text()


def test_tied_weights_have_any_of_their_names(tmp_path: Path) -> None:
    said = {"": meta(aliases={"b": ["tied.b"]})}
    a = make(tmp_path / "a", OLD, metas=said)
    renamed = {("tied.b" if name == "b" else name): v for name, v in bare(OLD).items()}
    for name, weights in (("other", renamed), ("both", {**bare(OLD), **renamed})):
        save_file(weights, tmp_path / f"{name}.safetensors")
        report = diff(a, tmp_path / f"{name}.safetensors")
        assert report.ok and report.facts["compared_tensors"] == len(weights)
        assert diff(tmp_path / f"{name}.safetensors", a).ok
    weights["tied.b"] = weights["b"] + 1
    save_file(weights, tmp_path / "untied.safetensors")
    assert not diff(a, tmp_path / "untied.safetensors").ok


def test_profiles_and_prefixes(tmp_path: Path) -> None:
    one = {"schedule": {"type": "Constant", "decay": 0.9}, "decay": 0.9, "seed_weight": 0.0}
    said = meta(profiles={"fast": one, "slow": one})
    tensors = {f"{p}fast.w": np.ones(3, "f4") for p in ("", "old.")}
    tensors |= {f"{p}slow.w": np.zeros(3, "f4") for p in ("", "old.")}
    a = make(tmp_path / "a", tensors, metas={"": said, "old.": said})
    b = single(tmp_path / "b", w=np.zeros(3, "f4"))
    for prefix in ("", "old"):
        assert diff(a, b, profile="slow", prefix=prefix).ok
        assert not diff(a, b, profile="fast", prefix=prefix).ok
    with pytest.raises(CheckpointMismatchError, match="several prefixes"):
        diff(a, b, profile="slow")
    with pytest.raises(CheckpointMismatchError, match="no profile 'ema'"):
        diff(a, b, prefix="")


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_eight_bit_floats_and_what_is_not_read(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_torch({"w": torch.full((4,), value).to(torch.float8_e4m3fn)},
                   tmp_path / f"{name}.safetensors")  # fmt: skip
    assert diff(tmp_path / "a.safetensors", tmp_path / "a.safetensors").ok
    report = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tolerance=9)
    assert not report.ok and report.facts["differing_elements"] == 4
    state = {"w": torch.ones(3), "c": torch.ones(3, dtype=torch.complex32)}
    dcp.save(state, checkpoint_id=tmp_path / "d", no_dist=True)
    report = diff(tmp_path / "d", tmp_path / "d")
    assert not report.ok and "not read, such as c" in report.text()


def test_an_adapter(tmp_path: Path) -> None:
    key = "base_model.model.q.lora_A.default.weight"
    a = make(
        tmp_path / "a", {f"ema.{key}": np.ones(4, "f4")}, metas={"": meta(adapters=["default"])}
    )
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    weights = {"base_model.model.q.lora_A.weight": np.ones(4, "f4")}
    save_file(weights, tmp_path / "peft" / "adapter_model.safetensors")
    assert diff(a, tmp_path / "peft").ok and diff(tmp_path / "peft", a).ok


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(tmp_path / "a", OLD), make(tmp_path / "b", NEW)
    assert main(["diff", str(a), str(a), "--tensors"]) == 0
    assert re.search(r"\n +a\.w +F32 +0 ", capsys.readouterr().out)
    assert main(["diff", str(a), str(b), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["diff", str(a), str(b), "--tolerance", "1"]) == 0
    assert main(["diff", str(a), str(tmp_path / "nothing")]) == 2
    assert main(["diff", str(a), str(b), "--tolerance", "-1"]) == 2
    flip(a / "shard-00000.safetensors", 4100)
    with pytest.raises(CheckpointCorruptError):
        diff(a, b)
    assert main(["diff", str(a), str(b)]) == 1


PEAK = """
import re, sys
from pathlib import Path
from sharded_ema import diff
assert diff(sys.argv[1], sys.argv[2]).ok
assert "torch" not in sys.modules
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    wide = {"ema.w": np.ones((2048, 12288), "f4")}  # 100 MB, cut another way on each side
    a, b = make(tmp_path / "a", wide, grid), make(tmp_path / "b", wide, rows(3))
    run = [sys.executable, "-c", PEAK, str(a), str(b)]
    peak = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(peak.stdout) < 128, "megabytes"
