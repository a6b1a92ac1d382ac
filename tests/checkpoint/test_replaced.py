"""A checkpoint that is replaced or removed while it is read: whole, or an error that says so.

The other job acts at chosen calls of the reader, so that every order is certain.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sharded_ema import ShardedEMA, consolidate, verify
from sharded_ema.checkpoint import files
from sharded_ema.checkpoint.files import Directory, OpenFile
from sharded_ema.checkpoint.reading import manifest
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.checkpoint.storage_reader import SafetensorsStorageReader
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointGoneError,
    CheckpointNotFoundError,
)


def save(path: Path, step: int) -> None:
    """A checkpoint all of whose elements are its step, in place of what is there."""
    layer = torch.nn.Linear(3, 2)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, step)
    ShardedEMA(layer, 0.9).save(path, step=step, replace=True, latest=False)


def values(ema: ShardedEMA) -> set[float]:
    state = ema.state_dict()
    return {v for key in state if key.startswith("ema.") for v in state[key].unique().tolist()}


class Meddler:
    """Does something before the n-th file of a directory is opened, or its names are listed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self.calls, self._at, self._act = 0, at, act
        for method in ("open_new", "names"):
            monkeypatch.setattr(Directory, method, self._around(getattr(Directory, method)))

    def _around(self, original: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object) -> object:
            self.calls += 1
            if self.calls == self._at:
                self._act()
            return original(*args)

        return wrapped


def count_calls(path: Path) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        meddler = Meddler(monkeypatch, 0, lambda: None)
        ShardedEMA(torch.nn.Linear(3, 2), 0.9).load(path)
        return meddler.calls


@pytest.mark.parametrize("held_open", [32, 1, 0])
def test_a_load_gives_one_save_whole_wherever_another_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_open: int
) -> None:
    monkeypatch.setattr(files, "_MAX_OPEN_FILES", held_open)
    monkeypatch.setattr(files, "_MAX_HELD", held_open)
    path = tmp_path / "last"
    save(path, 1)
    for at in range(1, count_calls(path) + 1):
        save(path, 1)
        ema = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
        with monkeypatch.context() as patch:
            Meddler(patch, at, lambda: save(path, 2))
            step = ema.load(path)
        assert values(ema) == {float(step)}


def test_what_is_removed_meanwhile_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step_1"
    save(path, 1)
    for at in range(1, count_calls(path) + 1):
        save(path, 1)
        ema = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
        with monkeypatch.context() as patch:
            Meddler(patch, at, lambda: shutil.rmtree(path))
            try:
                assert ema.load(path) == 1 and values(ema) == {1.0}
            except CheckpointNotFoundError as error:
                assert type(error) is CheckpointNotFoundError
    with pytest.raises(CheckpointNotFoundError):
        ema.load(path)


def test_one_that_is_replaced_again_and_again_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last"
    save(path, 1)
    check = manifest.check_header

    def meddle(directory: Directory, record: manifest.FileRecord) -> None:
        save(path, 2)
        shutil.rmtree(path)
        save(path, 3)
        check(directory, record)

    monkeypatch.setattr("sharded_ema.checkpoint.loading.check_header", meddle)
    with pytest.raises(CheckpointNotFoundError, match="removed or replaced while it was read"):
        ShardedEMA(torch.nn.Linear(3, 2), 0.9).load(path)


def test_what_was_opened_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "last"
    save(path, 1)
    with open_checkpoint(path) as checkpoint:
        save(path, 2)
        # Its files are held open, so they outlive their names.
        assert (
            torch.frombuffer(
                bytearray(checkpoint.tensors["ema.weight"].read()), dtype=torch.float32
            )
            .eq(1.0)
            .all()
        )
        checkpoint.close()
        with pytest.raises(CheckpointGoneError, match="removed or replaced while it was read"):
            checkpoint.tensors["ema.weight"].read()


def test_damage_is_not_taken_for_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "last"
    save(path, 1)
    (path / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointCorruptError, match="is missing"):
        ShardedEMA(torch.nn.Linear(3, 2), 0.9).load(path)
    assert not verify(path).ok


def test_tools_say_that_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step_1"
    read_at = OpenFile.read_at

    def stale(self: OpenFile, view: memoryview, position: int) -> int:
        """As network file systems answer for what another machine has removed."""
        if position > 4096 and path.exists():
            shutil.rmtree(path)
        if not path.exists():
            raise CheckpointCorruptError("Stale file handle")
        return read_at(self, view, position)

    for number, call in enumerate(
        (lambda: verify(path), lambda: consolidate(path, tmp_path / "out", progress=False))
    ):
        save(path, number)
        with monkeypatch.context() as patch:
            patch.setattr(OpenFile, "read_at", stale)
            with pytest.raises(CheckpointGoneError):
                call()


def test_ranks_that_opened_two_saves_load_neither(tmp_path: Path) -> None:
    path = tmp_path / "last"
    plans = []
    for step in (1, 2):
        save(path, step)
        reader = SafetensorsStorageReader(path)
        plan = torch.distributed.checkpoint.LoadPlan([])
        plans.append(reader.prepare_local_plan(plan))
    assert reader.prepare_global_plan([plans[1], plans[1]]) == [plans[1], plans[1]]
    with pytest.raises(CheckpointGoneError):
        reader.prepare_global_plan(plans)


def test_links_lead_out_of_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    shard = tmp_path / "a" / "shard-00000.safetensors"
    outside = tmp_path / "outside"
    os.rename(shard, outside)
    shard.symlink_to(outside)
    with pytest.raises(CheckpointCorruptError, match="leads out of the directory"):
        ShardedEMA(torch.nn.Linear(3, 2), 0.9).load(tmp_path / "a")
