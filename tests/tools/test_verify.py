"""``verify``: all damage is reported, and an average that is a copy of the weights is found out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save_file

from sharded_ema.cli import main
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
    CheckpointUnreachableError,
)
from sharded_ema.tools.verify import verify
from tests.helpers.checkpoints import flip, grid, make, meta, meta_bytes, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RANDOM = np.random.default_rng(0)
WEIGHTS = {"a.w": RANDOM.random((7, 5), "f4"), "b": RANDOM.random(9, "f4")}
AVERAGE = {f"ema.{name}": value + np.float32(0.25) for name, value in WEIGHTS.items()}


def profile(decay: float = 0.999, **schedule: object) -> dict[str, object]:
    described = schedule or {"type": "Constant", "decay": decay}
    return {"schedule": described, "decay": decay, "seed_weight": 0.5}


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    report = verify(make(tmp_path / "c", AVERAGE, rows(3)))
    assert report.ok and not report.problems
    assert report.facts["metadata"] == "verified"
    assert report.facts["files"] == 5 and report.facts["tensors"] == 3
    size = sum(p.stat().st_size for p in (tmp_path / "c").iterdir() if p.name != "manifest.json")
    assert report.facts["bytes"] == size


def test_all_damage_is_listed_with_file_tensor_and_bytes(tmp_path: Path) -> None:
    path = make(tmp_path / "c", AVERAGE, rows(2))
    flip(path / "shard-00000.safetensors", 4096 + 3)
    flip(path / "shard-00001.safetensors", 4096 + 7)
    flip(path / "shard-00001.safetensors", 50)
    last = (path / "shard-00000.safetensors").stat().st_size - 1
    flip(path / "shard-00000.safetensors", last)
    (path / "stranger").touch()
    problems = verify(path).problems
    assert len(problems) == 5
    text = "\n".join(problems)
    assert "shard-00000.safetensors, bytes 4096 to 4176: ema.a.w, the chunk at (0, 0)" in text
    assert "shard-00001.safetensors, bytes 4096 to 4156: ema.a.w, the chunk at (4, 0)" in text
    assert f"bytes {last + 1 - 4096} to {last + 1}: _meta" in text
    assert "the header of" in text and "bytes 0 to 4096" in text
    assert "'stranger'" in text


def test_truncated_and_missing_files_name_their_tensors(tmp_path: Path) -> None:
    path = make(tmp_path / "c", AVERAGE, grid)
    shard = path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:4100])
    (path / "shard-00002.safetensors").unlink()
    problems = verify(path).problems
    assert any("shard-00001" in p and "truncated" in p for p in problems)
    assert any("shard-00001" in p and "ema.a.w, the chunk at (0, 1)" in p for p in problems)
    assert any("shard-00002" in p and "is missing" in p for p in problems)
    assert any("shard-00002" in p and "ema.a.w, the chunk at (3, 0)" in p for p in problems)
    assert not any("shard-00000" in p or "shard-00003" in p for p in problems)


@pytest.mark.parametrize("name", ["manifest.json", "chunks.safetensors"])
def test_without_its_tables_nothing_is_trusted(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "c", AVERAGE)
    flip(path / name, 30)
    report = verify(path)
    assert not report.ok and name in report.text()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "c")
    (make(tmp_path / "c", AVERAGE) / "manifest.json").unlink()
    with pytest.raises(CheckpointUncommittedError):
        verify(tmp_path / "c")


def test_descriptions_must_agree(tmp_path: Path) -> None:
    path = make(tmp_path / "c", AVERAGE, metas={"": meta(step=7)}, listed={"": meta(step=8)})
    report = verify(path)
    assert not report.ok and "_meta differs" in report.text()


# ---------------------------------------------------------------------- PyTorch's own format


def stock(path: Path, **more: object) -> Path:
    average = {key: torch.from_numpy(value) for key, value in AVERAGE.items()}
    average["_meta"] = torch.from_numpy(meta_bytes().copy())
    model = {key: torch.from_numpy(value) for key, value in WEIGHTS.items()}
    dcp.save({"model": model, "ema": average, **more}, checkpoint_id=path, no_dist=True)
    return path


def test_a_foreign_checkpoint_is_verified_as_far_as_it_can_be(tmp_path: Path) -> None:
    path = stock(tmp_path / "c", steps=[1, 2])
    report = verify(path)
    assert report.ok and report.facts["metadata"] == "unverified"
    data = path / "__0_0.distcp"
    raw = data.read_bytes()
    for key, value in [("ema.ema.a.w", AVERAGE["ema.a.w"]), ("model.b", WEIGHTS["b"])]:
        flip(data, raw.index(value.tobytes()) + 2)
        text = verify(path).text()
        assert "FAILED" in text and f"data/0 of {key} is damaged" in text
        assert str(raw.index(value.tobytes())) in text.replace(",", "")
        data.write_bytes(raw)
    # Also what is a pickle is checked by its sum, without being read.
    pickled = dcp.FileSystemReader(path).read_metadata().storage_data
    (info,) = [v for k, v in pickled.items() if k.fqn == "steps"]
    flip(data, raw.index(b"\x80", info.offset) + 3)
    assert "data.pkl of steps is damaged" in verify(path).text()


def test_sums_that_are_not_there_are_said_to_be_missing(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        stock(tmp_path / "c")
    finally:
        torch.serialization.set_crc32_options(True)
    report = verify(tmp_path / "c")
    assert report.ok and report.facts["unchecked"] > 0
    assert any("not checked" in note for note in report.notes)


def test_files_that_are_not_part_of_it_are_noted(tmp_path: Path) -> None:
    (stock(tmp_path / "c") / "__3_0.distcp").write_bytes(b"left behind")
    report = verify(tmp_path / "c")
    assert report.ok and any("__3_0.distcp" in note for note in report.notes)


# ---------------------------------------------------------------------- against the weights


def hugging_face(path: Path, weights: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    return path


def in_files(path: Path, weights: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    index = {}
    for i, (name, value) in enumerate(weights.items()):
        save_file({name: value}, path / f"part-{i}.safetensors")
        index[name] = f"part-{i}.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def single_file(path: Path, weights: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    save_file(weights, path / "weights.safetensors")
    return path / "weights.safetensors"


def in_dcp(path: Path, weights: dict[str, np.ndarray]) -> Path:
    state = {"app": {"model": {name: torch.from_numpy(v) for name, v in weights.items()}}}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


SOURCES = [hugging_face, in_files, single_file, in_dcp]


@pytest.mark.parametrize("write", SOURCES)
def test_the_distance_to_the_weights(tmp_path: Path, write: Callable) -> None:
    path = make(tmp_path / "c", AVERAGE, rows(2))
    facts = verify(path, model=write(tmp_path / "m", WEIGHTS)).facts["averages"][0]
    by_tensor = facts["relative_distance_by_tensor"]
    apart = norm = 0.0
    for name, value in WEIGHTS.items():
        average, raw = AVERAGE[f"ema.{name}"].astype("f8"), value.astype("f8")
        expected = np.linalg.norm(average - raw) / np.linalg.norm(raw)
        assert by_tensor[name] == pytest.approx(expected, rel=1e-12)
        apart, norm = apart + ((average - raw) ** 2).sum(), norm + (raw**2).sum()
    assert facts["relative_distance"] == pytest.approx((apart / norm) ** 0.5, rel=1e-12)
    assert facts["equal_tensors"] == 0 and facts["compared_tensors"] == 2


@pytest.mark.parametrize("write", SOURCES)
def test_a_copy_of_the_weights_is_no_average(tmp_path: Path, write: Callable) -> None:
    copy = {f"ema.{name}": value for name, value in WEIGHTS.items()}
    report = verify(make(tmp_path / "c", copy, rows(2)), model=write(tmp_path / "m", WEIGHTS))
    assert not report.ok and "no average" in report.text()


def test_one_element_in_the_last_place_makes_the_difference(tmp_path: Path) -> None:
    almost = {f"ema.{name}": value.copy() for name, value in WEIGHTS.items()}
    almost["ema.b"][-1] = np.nextafter(almost["ema.b"][-1], np.float32(2))
    model = hugging_face(tmp_path / "m", WEIGHTS)
    report = verify(make(tmp_path / "c", almost), model=model)
    assert report.ok and report.facts["averages"][0]["equal_tensors"] == 1
    assert report.facts["averages"][0]["relative_distance"] > 0


@pytest.mark.parametrize(
    "said, note",
    [
        ({"num_updates": 0, "applied_steps": 0, "last_lerp_step": 0}, "not started"),
        ({"profiles": {"ema": profile(0.0)}}, "decay was 0"),
        # The one update so far covered the first step, at which this schedule forgets all.
        ({"num_updates": 10, "applied_steps": 10, "last_lerp_step": 10, "update_every": 10,
          "profiles": {"ema": profile(0.9, type="Power", gamma=6.94)}}, "decay was 0"),
    ],
)  # fmt: skip
def test_what_may_equal_the_weights(tmp_path: Path, said: dict, note: str) -> None:
    copy = {f"ema.{name}": value for name, value in WEIGHTS.items()}
    path = make(tmp_path / "c", copy, metas={"": meta(**said)})
    report = verify(path, model=hugging_face(tmp_path / "m", WEIGHTS))
    assert report.ok and any(note in n for n in report.notes)


def test_after_the_first_window_that_schedule_is_no_excuse(tmp_path: Path) -> None:
    copy = {f"ema.{name}": value for name, value in WEIGHTS.items()}
    said = meta(
        num_updates=20, applied_steps=20, last_lerp_step=20, update_every=10,
        profiles={"ema": profile(0.9, type="Power", gamma=6.94)},
    )  # fmt: skip
    path = make(tmp_path / "c", copy, metas={"": said})
    assert not verify(path, model=hugging_face(tmp_path / "m", WEIGHTS)).ok


def test_tied_names_and_missing_ones(tmp_path: Path) -> None:
    copy = {f"ema.{name}": value for name, value in WEIGHTS.items()}
    path = make(tmp_path / "c", copy, metas={"": meta(aliases={"b": ["tied.b"]})})
    tied = hugging_face(tmp_path / "t", {"a.w": WEIGHTS["a.w"], "tied.b": WEIGHTS["b"]})
    assert not verify(path, model=tied).ok
    part = hugging_face(tmp_path / "p", {"a.w": WEIGHTS["a.w"]})
    report = verify(path, model=part)
    assert report.ok and any("not in the model" in note for note in report.notes)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "c", AVERAGE)
    with pytest.raises(CheckpointMismatchError, match="none of the averaged"):
        verify(path, model=hugging_face(tmp_path / "m", {"x": WEIGHTS["b"]}))
    with pytest.raises(CheckpointMismatchError, match=r"ema\.b"):
        verify(path, model=hugging_face(tmp_path / "n", {**WEIGHTS, "b": np.ones(8, "f4")}))
    with pytest.raises(CheckpointNotFoundError):
        verify(path, model=tmp_path / "nothing")
    raw = in_dcp(tmp_path / "raw", WEIGHTS)
    with pytest.raises(CheckpointMismatchError, match="no average"):
        verify(raw, model=raw)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="no weights"):
        verify(path, model=tmp_path / "empty")


def test_an_export_is_no_raw_model(tmp_path: Path) -> None:
    path = make(tmp_path / "c", AVERAGE)
    for name, arguments in (
        ("export", ["consolidate", str(path), str(tmp_path / "export")]),
        ("mean", ["average", str(path), "--out", str(tmp_path / "mean")]),
    ):
        assert main([*arguments, "--no-progress"]) == 0
        with pytest.raises(CheckpointMismatchError, match="is an average itself"):
            verify(path, model=tmp_path / name)
    raw = in_dcp(tmp_path / "raw", WEIGHTS)
    assert main(["consolidate", str(raw), str(tmp_path / "weights"), "--prefix", ""]) == 0
    assert verify(path, model=tmp_path / "weights").ok


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", 1, None, ["a"], ""])
def test_an_index_that_names_what_it_may_not(tmp_path: Path, name: object) -> None:
    path, model = make(tmp_path / "c", AVERAGE), hugging_face(tmp_path / "m", WEIGHTS)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.w": name}}))
    with pytest.raises(CheckpointCorruptError, match="is no index"):
        verify(path, model=model)
    index.write_text("[" * 100_000)
    with pytest.raises(CheckpointCorruptError, match="cannot be read as JSON"):
        verify(path, model=model)


def test_weights_that_are_links(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face Hub."""
    path, model = make(tmp_path / "c", AVERAGE), hugging_face(tmp_path / "m", WEIGHTS)
    (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "model.safetensors").symlink_to("../blob")
    assert verify(path, model=model).facts["averages"][0]["compared_tensors"] == 2


def test_an_average_and_its_weights_in_one_checkpoint(tmp_path: Path) -> None:
    path = stock(tmp_path / "c")
    report = verify(path, model=path)
    assert report.ok and report.facts["averages"][0]["compared_tensors"] == 2
    assert report.facts["averages"][0]["relative_distance"] > 0


def test_half_precision_weights_and_not_finite_ones(tmp_path: Path) -> None:
    path = make(tmp_path / "c", AVERAGE, rows(3))
    half = {name: value.astype("f2") for name, value in WEIGHTS.items()}
    half["b"][0] = np.nan
    facts = verify(path, model=hugging_face(tmp_path / "m", half)).facts["averages"][0]
    average, raw = AVERAGE["ema.a.w"].astype("f8"), half["a.w"].astype("f8")
    expected = np.linalg.norm(average - raw) / np.linalg.norm(raw)
    assert facts["relative_distance_by_tensor"]["a.w"] == pytest.approx(expected, rel=1e-12)
    assert facts["relative_distance_by_tensor"]["b"] is None


def test_a_damaged_checkpoint_is_not_compared(tmp_path: Path) -> None:
    path = make(tmp_path / "c", AVERAGE)
    flip(path / "shard-00000.safetensors", 4100)
    report = verify(path, model=hugging_face(tmp_path / "m", WEIGHTS))
    assert not report.ok and any("not compared" in note for note in report.notes)


def test_tensors_larger_than_a_block(tmp_path: Path) -> None:
    """Cut differently on both sides, so that blocks end at different elements."""
    wide = RANDOM.random((1100, 1100), "f4")  # 4.84 MB
    path = make(tmp_path / "c", {"ema.w": wide + 1}, grid)
    model = {"w": torch.from_numpy(wide).double().t()}  # column by column
    dcp.save(model, checkpoint_id=tmp_path / "m", no_dist=True)
    transposed = make(tmp_path / "t", {"ema.w": wide.T + 1}, rows(3))
    for average, raw in ((path, wide), (transposed, wide.T)):
        weights = hugging_face(tmp_path / f"m-{average.name}", {"w": np.ascontiguousarray(raw)})
        found = verify(average, model=weights).facts["averages"][0]["relative_distance"]
        apart = (raw + np.float32(1)).astype("f8") - raw.astype("f8")
        assert found == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(raw.astype("f8")))
    found = verify(transposed, model=tmp_path / "m").facts["averages"][0]["relative_distance"]
    assert found == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(wide.astype("f8")))


def test_a_difference_in_the_first_block_only(tmp_path: Path) -> None:
    wide = RANDOM.random(1_200_000, "f4")  # two blocks
    weights = hugging_face(tmp_path / "m", {"w": wide})
    wide[0] += 1
    report = verify(make(tmp_path / "c", {"ema.w": wide}), model=weights)
    assert report.ok and report.facts["averages"][0]["equal_tensors"] == 0


# ---------------------------------------------------------------------- the command


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = make(tmp_path / "c", AVERAGE), hugging_face(tmp_path / "m", WEIGHTS)
    assert main(["verify", str(path), "--model", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["metadata"] == "verified"
    copy = make(tmp_path / "d", {f"ema.{name}": value for name, value in WEIGHTS.items()})
    assert main(["verify", str(copy), "--model", str(model)]) == 1
    flip(path / "shard-00000.safetensors", 4100)
    assert main(["verify", str(path)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert main(["verify", str(copy), "--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("sharded-ema: error: ") == 2


@pytest.mark.parametrize(
    ("error", "status"), [(CheckpointUnreachableError, 2), (CheckpointCorruptError, 1)]
)
def test_a_store_that_does_not_answer_is_no_damage(
    tmp_path: Path, error: type[Exception], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error("the file cannot be read")

    monkeypatch.setattr("sharded_ema.tools.verify.scan_file", fails)
    assert main(["verify", str(make(tmp_path / "c", AVERAGE))]) == status


PEAK = """
import re, sys
from pathlib import Path
from sharded_ema.tools.verify import verify
assert verify(sys.argv[1]).ok
assert "torch" not in sys.modules
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    source = make(tmp_path / "c", {"ema.w": np.ones((4096, 12288), "f4")}, grid)  # 200 MB
    peak = subprocess.run(
        [sys.executable, "-c", PEAK, str(source)], capture_output=True, text=True, check=True
    )
    assert int(peak.stdout) < 128, "megabytes"
