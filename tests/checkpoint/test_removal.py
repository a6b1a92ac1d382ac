"""What lies beside a checkpoint: the pointer to the last, old ones, leftovers of killed saves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from sharded_ema import ShardedEMA, consolidate, latest_checkpoint
from sharded_ema.checkpoint import durable, removal
from sharded_ema.checkpoint.removal import Occupied
from sharded_ema.checkpoint.run import committed
from sharded_ema.checkpoint.writing import target
from sharded_ema.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    ConfigError,
    EMAWarning,
)


@pytest.fixture
def ema() -> ShardedEMA:
    return ShardedEMA(torch.nn.Linear(3, 2), 0.9)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_last_ones_are_kept(ema: ShardedEMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "best", step=0)
    (tmp_path / "step_notes").mkdir()
    for step in range(5):
        ema.save(tmp_path / f"step_{step}", step=step, keep_last=2)
    assert names(tmp_path) == {"best", "step_notes", "step_3", "step_4", "latest"}
    ema.save(tmp_path / "step_5", step=5, keep_last=1, asynchronous=True).result()
    assert names(tmp_path) == {"best", "step_notes", "step_5", "latest"}
    for wrong in (0, -1, 1.0, True):
        with pytest.raises(ConfigError, match="keep_last"):
            ema.save(tmp_path / "step_6", step=6, keep_last=wrong)  # type: ignore[arg-type]


def test_after_going_back_the_new_ones_count(ema: ShardedEMA, tmp_path: Path) -> None:
    for step in (100, 200, 300):
        ema.save(tmp_path / f"step_{step}", step=step)
    ema.load(tmp_path / "step_100")
    ema.save(tmp_path / "step_150", step=150, keep_last=2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_150"
    assert names(tmp_path) == {"step_300", "step_150", "latest"}


def test_latest_is_followed(ema: ShardedEMA, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        latest_checkpoint(tmp_path / "nowhere")
    ema.save(tmp_path / "a", step=1)
    ema.save(tmp_path / "b", step=2)
    ema.save(tmp_path / "quiet", step=3, latest=False)
    assert (tmp_path / "latest").read_text() == "b\n"
    assert ema.load(tmp_path / "latest") == 2
    assert consolidate(tmp_path / "latest", tmp_path / "out", progress=False).ok
    assert latest_checkpoint(tmp_path) == tmp_path / "quiet"
    with pytest.raises(CheckpointNotFoundError, match="3 directories in it do, such as quiet"):
        ema.load(tmp_path)
    for wrong in ("../b", "", "/etc", "b\0"):
        (tmp_path / "latest").write_text(wrong)
        with pytest.raises(CheckpointNotFoundError):
            ema.load(tmp_path / "latest")


def test_what_others_call_latest_stays(ema: ShardedEMA, tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "latest").write_text("global_step3")  # as DeepSpeed writes it
    ema.save(tmp_path / "a", step=1)
    assert (tmp_path / "latest").read_text() == "global_step3"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "latest").symlink_to("elsewhere")
    ema.save(tmp_path / "linked" / "a", step=1)
    assert (tmp_path / "linked" / "latest").readlink() == Path("elsewhere")


def test_trouble_beside_a_commit_is_a_warning(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, data: bytes) -> None:
        raise OSError("no room for a name")

    monkeypatch.setattr(durable, "replace_durably", fails)
    with pytest.warns(EMAWarning, match="is committed, but .* no room for a name"):
        ema.save(tmp_path / "a", step=1)
    assert ema.load(tmp_path / "a", verify=True) == 1


def test_a_damaged_checkpoint_is_neither_last_nor_removed(ema: ShardedEMA, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        ema.save(tmp_path / f"step_{step}", step=step)
    manifest = tmp_path / "step_3" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    assert latest_checkpoint(tmp_path) == tmp_path / "step_2"
    ema.save(tmp_path / "step_4", step=4, keep_last=1)
    assert names(tmp_path) == {"step_3", "step_4", "latest"}


def test_time_of_commit_is_recorded_and_optional(ema: ShardedEMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "a", step=1)
    (only,) = committed(tmp_path)
    stored = json.loads((tmp_path / "a" / "manifest.json").read_bytes())["saved_at"]
    assert only.saved_at == stored > 1_700_000_000_000


def leftover(folder: Path, base: str, *files: str) -> Path:
    path = folder / f"{base}-{uuid4().hex}"
    path.mkdir()
    for file in files:
        (path / file).write_bytes(b"x")
    return path


def test_leftovers_of_killed_saves_go_at_the_next_one(ema: ShardedEMA, tmp_path: Path) -> None:
    leftover(tmp_path, "step_1.tmp", "shard-00000.safetensors", "shard-00001.safetensors")
    leftover(tmp_path, "step_2.tmp", "__0_0.distcp", ".metadata.tmp")
    leftover(tmp_path, "step_3.tmp")
    (tmp_path / f"latest.tmp-{uuid4().hex}").write_bytes(b"step")
    ema.save(tmp_path / "a", step=1)
    shutil.copytree(tmp_path / "a", tmp_path / f"a.old-{uuid4().hex}")
    shutil.copytree(tmp_path / "a", tmp_path / f"lost.old-{uuid4().hex}")
    mine = [
        leftover(tmp_path, "notes.tmp", "shard-00000.safetensors", "letter.txt"),
        tmp_path / "step_1.tmp-123",
    ]
    mine[1].mkdir()
    ema.save(tmp_path / "b", step=2)
    left = names(tmp_path) - {path.name for path in mine}
    # A checkpoint that was about to be replaced, and has no successor, is the only copy.
    assert left == {"a", "b", "lost", "latest"}
    assert all(path.exists() for path in mine)
    assert ema.load(tmp_path / "lost") == 1


def test_what_another_save_is_writing_is_not_a_leftover(ema: ShardedEMA, tmp_path: Path) -> None:
    with Occupied(tmp_path):
        other = leftover(tmp_path, "step_1.tmp", "shard-00000.safetensors")
        ema.save(tmp_path / "step_2", step=2)
        assert other.exists()
    ema.save(tmp_path / "step_3", step=3)
    assert not other.exists()


def test_a_save_whose_directory_was_removed_cannot_commit(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = target.publish

    def robbed(staging: Path, path: Path, *, replace: bool) -> None:
        removal.remove(staging)
        publish(staging, path, replace=replace)

    monkeypatch.setattr(target, "publish", robbed)
    with pytest.raises(CheckpointWriteError, match="No such file or directory"):
        ema.save(tmp_path / "a", step=1)
    assert not (tmp_path / "a").exists()


def test_a_replacement_that_fails_puts_the_old_one_back(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema.save(tmp_path / "last", step=1)
    rename = os.rename

    def refuses(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "last" and ".tmp-" in str(source):
            raise OSError("not today")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses)
    with pytest.raises(CheckpointWriteError, match="not today"):
        ema.save(tmp_path / "last", step=2, replace=True)
    monkeypatch.undo()
    assert names(tmp_path) == {"last", "latest"}
    assert ema.load(tmp_path / "last") == 1
    with pytest.raises(CheckpointExistsError):
        ema.save(tmp_path / "last", step=2)


@pytest.mark.parametrize("name", ["x.tmp-1", "exp.tmp-2024-01", f"x.old-{'0' * 32}"])
def test_names_that_nobody_would_read_are_refused(
    ema: ShardedEMA, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="choose one without"):
        ema.save(tmp_path / name, step=1)
    assert not names(tmp_path)
