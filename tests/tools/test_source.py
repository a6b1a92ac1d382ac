"""Checkpoints of other software become one model, with all their bytes or not at all."""

from __future__ import annotations

import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard

from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.cli import main
from sharded_ema.errors import CheckpointCorruptError, CheckpointMismatchError
from sharded_ema.tools.average import average
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.diff import diff
from sharded_ema.tools.inspection import inspect
from tests.helpers.checkpoints import flip
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]

WRITES_SHARDS = "save_distributed" in signature(HuggingFaceStorageWriter).parameters
needs_shards = pytest.mark.skipif(
    not WRITES_SHARDS, reason="the HuggingFaceStorageWriter of this PyTorch writes no shards"
)


class Model(nn.Module):
    """Rows that do not divide by the ranks, a scalar, an integer and a boolean buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.last = nn.Linear(8, 5, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([4.6052]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("ratio", torch.tensor(0.25))


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Model()
    wanted = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for layer in (model.first, model.last):
        fully_shard(layer)
    fully_shard(model)
    return model, wanted


def save_as_others_do(folder: str) -> dict[str, Tensor]:
    """What trainers write: weights, optimizer and a step, and the writer for Hugging Face."""
    model, wanted = build()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    weights, optim = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": optim, "step": 12, "ema": {"0.99": weights}}
    dcp.save(state, checkpoint_id=f"{folder}/dcp")
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/flat")
    if WRITES_SHARDS:
        writer = HuggingFaceStorageWriter(f"{folder}/hf", save_distributed=True)
        dcp.save(get_model_state_dict(model), storage_writer=writer)
        files = {name: 1 + index % 2 for index, name in enumerate(wanted)}
        writer = HuggingFaceStorageWriter(f"{folder}/hf2", files, save_distributed=True)
        dcp.save(get_model_state_dict(model), storage_writer=writer)
    dist.barrier()
    return wanted


@pytest.fixture(scope="module")
def saved(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("foreign")
    wanted = worlds[3].run(save_as_others_do, str(folder))[0]
    (folder / "like").mkdir()
    save_file(
        {n: torch.zeros_like(t) for n, t in wanted.items()}, folder / "like" / "model.safetensors"
    )
    return folder, wanted


def check(target: Path, wanted: dict[str, Tensor]) -> None:
    found = load_file(target / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def run(source: Path, target: Path, **options: Any) -> Any:
    return consolidate(source, target, progress=False, **options)


@pytest.mark.parametrize(
    ("name", "prefix"), [("dcp", "model"), ("dcp", "model."), ("dcp", "ema.0.99"), ("flat", "")]
)
def test_any_dcp_checkpoint(saved: tuple, name: str, prefix: str, tmp_path: Path) -> None:
    folder, wanted = saved
    report = run(folder / name, tmp_path / "out", prefix=prefix)
    assert report.ok and report.facts["metadata"] == "unverified"
    assert report.facts["kind"] == "tensors" and "step" not in report.facts
    check(tmp_path / "out", wanted)


def test_pickled_values_are_told_and_left_out(saved: tuple, tmp_path: Path) -> None:
    report = run(saved[0] / "dcp", tmp_path / "out", prefix="", include=["model.*"])
    assert report.ok and "no tensors" in report.text()


def test_no_prefix_is_no_guess(saved: tuple, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"--prefix.*'ema', 'model', 'optimizer'"):
        run(saved[0] / "dcp", tmp_path / "out")
    with pytest.raises(CheckpointMismatchError, match="neither an average nor tensors"):
        run(saved[0] / "dcp", tmp_path / "out", prefix="mod")
    with pytest.raises(CheckpointMismatchError, match="profile"):
        run(saved[0] / "dcp", tmp_path / "out", prefix="model", profile="fast")


@needs_shards
@pytest.mark.parametrize("name", ["hf", "hf2"])
def test_shards_of_the_writer_for_hugging_face(saved: tuple, name: str, tmp_path: Path) -> None:
    folder, wanted = saved
    report = run(folder / name, tmp_path / "out", prefix="", like=folder / "like")
    assert report.ok and "no checksum" in report.text()
    check(tmp_path / "out", wanted)


@needs_shards
@pytest.mark.parametrize("prefix", ["", None])
def test_their_shapes_are_not_known(saved: tuple, prefix: str | None, tmp_path: Path) -> None:
    folder, wanted = saved
    report = run(folder / "hf", tmp_path / "out", prefix=prefix)
    assert report.ok and "a missing last one goes unnoticed" in report.text()
    assert "--like" in report.text()
    check(tmp_path / "out", wanted)
    assert average([folder / "hf", tmp_path / "out"], out=tmp_path / "mean", progress=False).ok
    assert diff(folder / "hf2", tmp_path / "mean").ok


@needs_shards
def test_what_is_in_them(saved: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, wanted = saved
    report = inspect(folder / "hf", tensors=True)
    assert report.ok and "no checksums" in report.text()
    listed = {row["name"]: (row["shape"], row["chunks"]) for row in report.facts["list"]}
    assert listed.keys() == wanted.keys() and listed["first.weight"] == ([8, 5], 3)
    assert main(["verify", str(folder / "hf")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no checksums" in line and "headers fit" in line
    shutil.copytree(folder / "hf", tmp_path / "c")
    first, second, _ = sorted((tmp_path / "c").iterdir())
    second.unlink()
    assert main(["verify", str(tmp_path / "c")]) == 1 and "holes" in capsys.readouterr().err
    first.write_bytes(first.read_bytes()[:-1])
    assert main(["verify", str(tmp_path / "c")]) == 1


@needs_shards
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_missing_shard(saved: tuple, rank: int, tmp_path: Path) -> None:
    folder, _ = saved
    shutil.copytree(folder / "hf", tmp_path / "c")
    (tmp_path / "c" / f"shard-0000{rank}-model-00001-of-00001.safetensors").unlink()
    # What is stored once, and not in rows, lies in the shard of any rank.
    there = {name for file in (tmp_path / "c").iterdir() for name in load_file(file)}
    (tmp_path / "like").mkdir()
    known = {
        n: t for n, t in load_file(folder / "like" / "model.safetensors").items() if n in there
    }
    save_file(known, tmp_path / "like" / "model.safetensors")
    if rank == 3:  # what is left is a smaller tensor without a hole
        report = run(tmp_path / "c", tmp_path / "out", prefix="", like=tmp_path / "like")
        assert not report.ok and "first.weight is (6, 5) here and (8, 5)" in report.text()
    else:
        with pytest.raises(CheckpointCorruptError, match="holes"):
            run(tmp_path / "c", tmp_path / "out", prefix="", like=tmp_path / "like")
    assert not (tmp_path / "out").exists()


@needs_shards
@pytest.mark.parametrize("fault", ["truncated", "no place", "other dtype", "twice"])
def test_broken_shards(saved: tuple, fault: str, tmp_path: Path) -> None:
    folder, _ = saved
    shutil.copytree(folder / "hf", tmp_path / "c")
    first, second = sorted((tmp_path / "c").iterdir())[:2]
    if fault == "truncated":
        second.write_bytes(second.read_bytes()[:-1])
    elif fault == "no place":
        save_file({"first.weight": torch.zeros(3, 5)}, second, {"DCP_SHARDING_INFO": "{}"})
    elif fault == "other dtype":
        info = '{"first.weight":{"saved_offsets":[3,0]}}'
        save_file({"first.weight": torch.zeros(3, 5).half()}, second, {"DCP_SHARDING_INFO": info})
    else:
        shutil.copy(first, tmp_path / "c" / first.name.replace("00001", "00009", 1))
    with pytest.raises(CheckpointCorruptError):
        run(tmp_path / "c", tmp_path / "out", prefix="", like=folder / "like")
    assert not (tmp_path / "out").exists()


def test_a_changed_byte(saved: tuple, tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "flat", tmp_path / "c")
    chunk = open_checkpoint(tmp_path / "c").tensors["last.weight"].chunks()[1]
    flip(tmp_path / "c" / chunk.file, chunk.byte_offset + 3)
    with pytest.raises(CheckpointCorruptError, match="last"):
        run(tmp_path / "c", tmp_path / "out", prefix="")
