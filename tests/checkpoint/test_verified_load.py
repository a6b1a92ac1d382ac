"""``load(verify=True)`` on several ranks: what one of them finds stops all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sharded_ema import ShardedEMA, verify
from sharded_ema.errors import CheckpointCorruptError, EMAError, StateError
from tests.helpers.layouts import assert_equal, build, rank
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]


def one_file_of_another_save(folder: str, format: str, whole: bool) -> list[tuple[str, str]]:
    """Rank 1's file, or the data in it, comes from the save of a later step."""
    root = Path(folder)
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    for step in (1, 2):
        run.step(step)
        ema.save(root / str(step), step=step, format=format)
        if step == 1:
            first = averages(ema)
    found: list[tuple[str, str]] = []

    def attempt(call) -> None:
        try:
            call()
        except EMAError as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("nothing", ""))

    mixed = root / "mixed"
    if rank() == 0:
        shutil.copytree(root / "1", mixed)
        name = "__1_0.distcp" if format == "dcp" else "shard-00001.safetensors"
        mine, theirs = (mixed / name).read_bytes(), (root / "2" / name).read_bytes()
        assert len(mine) == len(theirs) and mine != theirs
        header = 0 if whole else 4096
        (mixed / name).write_bytes(mine[:header] + theirs[header:])
        assert not verify(mixed).ok
    dist.barrier()
    attempt(lambda: ema.load(mixed, verify=True))
    attempt(ema.update)
    assert ema.load(root / "1", verify=True) == 1
    assert_equal(averages(ema), first)
    attempt(ema.update)
    ema.close()
    return found


@pytest.mark.parametrize(
    "format, whole", [("dcp", True), ("safetensors", True), ("safetensors", False)]
)
def test_files_of_two_saves(worlds: Worlds, tmp_path: Path, format: str, whole: bool) -> None:
    found = worlds[2].run(one_file_of_another_save, str(tmp_path), format, whole)
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    (load, message), (update, _), (after, _) = found[0]
    assert load == CheckpointCorruptError.__name__
    # Headers are compared before anything is read, data as it is read.
    read = format == "dcp" or not whole
    assert update == (StateError.__name__ if read else "nothing")
    assert after == "nothing"
    if read:
        assert "rank 1" in message and ("__1_0" in message or "shard-00001" in message)


def test_what_is_damaged_is_not_taken(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))
    for format in ("safetensors", "dcp"):
        path = tmp_path / format
        ema = ShardedEMA(model, 0.9)
        ema.save(path, step=1, format=format)
        ema.save(tmp_path / f"good-{format}", step=1, format=format)
        (file,) = [*path.glob("shard-*"), *path.glob("__*")]
        data = bytearray(file.read_bytes())
        last = data.rindex(model[3].weight.detach().numpy().tobytes())
        data[last] ^= 1
        file.write_bytes(data)
        other = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))
        into = ShardedEMA(other, 0.9)
        (views,) = into._average.shadow.views.values()
        before = [view.clone() for view in views]
        with pytest.raises(CheckpointCorruptError):
            into.load(path, verify=True)
        # A file of DCP's is compared as it is read, to its end; a chunk before it is copied.
        if format == "safetensors":
            assert torch.equal(views[6], before[6]) and not torch.equal(views[0], before[0])
        with pytest.raises(StateError):
            into.update()
        assert into.load(tmp_path / f"good-{format}", verify=True) == 1
        into.update()
