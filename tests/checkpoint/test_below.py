"""A directory that is no checkpoint says what lies below it; what others leave is no damage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save_file

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.checkpoint.run import latest_checkpoint
from sharded_ema.cli import main
from sharded_ema.errors import CheckpointCorruptError, CheckpointNotFoundError
from sharded_ema.tools.average import average
from sharded_ema.tools.diff import diff
from sharded_ema.tools.inspection import inspect
from sharded_ema.tools.verify import verify
from tests.helpers.checkpoints import make, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TENSORS = {"ema.w": np.arange(12, dtype="f4").reshape(4, 3)}


def of_dcp(path: Path) -> Path:
    dcp.save({"model": {"w": torch.ones(2, 3)}}, checkpoint_id=path, no_dist=True)
    return path


def of_safetensors(path: Path) -> Path:
    path.mkdir(parents=True)
    save_file({"w": np.ones(3, "f4")}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("kind", "places", "named"),
    [(of_dcp, ["pytorch_model_fsdp_0", "optimizer_0"], "pytorch_model_fsdp_0"),
     (of_dcp, ["checkpoint-900/pytorch_model_fsdp_0", "checkpoint-1000/pytorch_model_fsdp_0"],
      "checkpoint-1000/pytorch_model_fsdp_0"),
     (of_dcp, ["checkpoints/checkpoint_3/pytorch_model_fsdp_0"],
      "checkpoints/checkpoint_3/pytorch_model_fsdp_0"),
     (of_safetensors, ["checkpoint-9", "checkpoint-10"], "checkpoint-10"),
     (of_safetensors, ["snapshots/0f3a"], "snapshots/0f3a")],
)  # fmt: skip
def test_what_lies_below_is_named(
    kind, places: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in places:
        kind(tmp_path / "run" / place)
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    (tmp_path / "run" / "runs").mkdir()
    there, other = str(tmp_path / "run"), str(of_safetensors(tmp_path / "other"))
    out = str(tmp_path / "out")
    source = make(tmp_path / "c", TENSORS)
    for command in (
        ["inspect", there],
        ["verify", there],
        ["consolidate", there, out, "--prefix", "model"],
        ["diff", there, other],
        ["diff", other, there],
        ["average", other, there, "--out", out],
        ["consolidate", str(source), out, "--base", there],
    ):
        assert main(command) == 2, command
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"such as {named}"), command


def test_ours_comes_first_and_temporary_ones_do_not_count(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-5" / "ema", TENSORS)
    of_dcp(tmp_path / "checkpoint-6" / "pytorch_model_fsdp_0")
    make(tmp_path / f"checkpoint-7.tmp-{'0' * 32}", TENSORS)
    with pytest.raises(
        CheckpointNotFoundError, match="2 directories in it do, such as checkpoint-5/ema"
    ):
        consolidate(tmp_path, tmp_path / "out", progress=False)
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(CheckpointNotFoundError, match=r"no \.metadata$"):
        consolidate(tmp_path / "empty", tmp_path / "out", progress=False)


# ---------------------------------------------------------------------- strays and links

STRAYS = [".gitattributes", ".nfs000000000a1b2c3d00000001", ".DS_Store", "._manifest.json",
          "README.md", ".cache/huggingface/x", ".ipynb_checkpoints/y"]  # fmt: skip


def litter(folder: Path) -> None:
    for name in STRAYS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"anything")


def as_in_the_hub(source: Path, repository: Path, below: str = "") -> Path:
    """The files of a checkpoint as ``snapshot_download`` lays them out: links into blobs."""
    snapshot = repository / "snapshots" / "0f3a" / below
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"{number:064}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize("below", ["", "run/step_1"])
@pytest.mark.parametrize("kind", ["ours", "dcp", "model"])
def test_a_snapshot_of_the_hub(kind: str, below: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if kind == "ours":
        make(source, TENSORS, rows(2))
    else:
        of_dcp(source) if kind == "dcp" else of_safetensors(source)
    there = as_in_the_hub(source, tmp_path / "models--a--b", below)
    litter(there)
    assert inspect(there).ok and diff(there, source).ok
    assert average([there, source], out=tmp_path / "m", prefix="model" * (kind == "dcp") or None,
                   progress=False).ok  # fmt: skip
    if kind != "model":
        report = verify(there)
        assert report.ok and "not part of it, such as .DS_Store" in report.text()
        prefix = "model" if kind == "dcp" else None
        assert consolidate(there, tmp_path / "out", prefix=prefix, progress=False).ok
    if kind == "ours" and below:
        assert latest_checkpoint(there.parent) == there


def test_loaded_from_the_hub(tmp_path: Path) -> None:
    ema = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    ema.save(tmp_path / "c", step=4)
    there = as_in_the_hub(tmp_path / "c", tmp_path / "models--a--b")
    litter(there)
    assert ema.load(there, verify=True) == 4


def test_links_out_of_the_cache_are_refused(tmp_path: Path) -> None:
    there = as_in_the_hub(make(tmp_path / "source", TENSORS), tmp_path / "models--a--b")
    shard = there / "shard-00000.safetensors"
    aside = tmp_path / "elsewhere"
    shutil.copy(shard, aside)
    blob = tmp_path / "models--a--b" / "blobs" / "out"
    blob.symlink_to(aside)
    for target in (aside, blob):
        shard.unlink()
        shard.symlink_to(target)
        with pytest.raises(CheckpointCorruptError, match="leads out of the directory"):
            inspect(there)


def test_what_is_no_stray(tmp_path: Path) -> None:
    path = make(tmp_path / "c", TENSORS)
    for name in ("notes.txt", ".metadata", "shard-00007.safetensors", "__0_0.distcp"):
        (path / name).write_bytes(b"")
        with pytest.raises(CheckpointCorruptError, match="does not list"):
            inspect(path)
        (path / name).unlink()
    litter(path)
    assert inspect(path).ok and verify(path).ok
