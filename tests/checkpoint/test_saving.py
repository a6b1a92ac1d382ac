"""Saves in the background, and failures of the file system, on several ranks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from sharded_ema import ShardedEMA, latest_checkpoint
from sharded_ema.errors import CheckpointError, CheckpointWriteError, EMAError
from tests.helpers.layouts import assert_equal, build, rank, sizes
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]


@contextmanager
def patched(name: str, function: Callable[..., Any]) -> Iterator[Any]:
    """A function of ``os`` replaced; yields the original."""
    original = getattr(os, name)
    setattr(os, name, function)
    try:
        yield original
    finally:
        setattr(os, name, original)


def full(ema: ShardedEMA) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in averages(ema).items()}


def save_while_training(mode: str, path: str, name: str) -> None:
    """Nothing reaches the disk for good before ten more updates are over."""
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    for index in range(3):
        run.step(index)
    frozen = {n: t.clone() for n, t in run.target.state_dict().items() if "scale" in n}
    expected = full(ema)
    trained = threading.Event()
    call = "fdatasync" if name == "safetensors" else "fsync"
    original = getattr(os, call)

    def held(descriptor: int) -> None:
        trained.wait()
        original(descriptor)

    with patched(call, held):
        handle = ema.save(path, step=3, asynchronous=True, format=name)
        handle.staged()
        for index in range(3, 13):
            run.step(index)
        dist.barrier()  # collectives of the training go on beside those of the save
        assert not handle.done()
        trained.set()
        assert handle.result() == Path(path)
    assert ema.num_updates == 13
    if rank() == 0:  # others may hold copies of what another rank writes
        assert ema.memory["staging"] >= ema.memory["shadow"]
    moved = full(ema)
    assert any(not bool((moved[n] == expected[n]).all()) for n in expected)
    assert frozen.keys() <= run.target.state_dict().keys()
    assert ema.load(path, verify=True) == 3
    assert_equal(averages(ema), expected)
    ema.close()


STAGED = ("fsdp2", "fsdp2_bf16", "ddp", "hsdp", "hsdp_whole", "tp_fsdp2", "fsdp1_hybrid")


@pytest.mark.parametrize("mode", STAGED)
def test_on_disk_is_the_state_of_the_call(worlds: Worlds, mode: str, tmp_path: Path) -> None:
    (size,) = sizes(mode, [2])
    name = ("safetensors", "dcp")[STAGED.index(mode) % 2]
    worlds[size].run(save_while_training, mode, str(tmp_path / "x"), name)


def test_a_save_leaves_filters_of_warnings_alone(tmp_path: Path) -> None:
    """They belong to the whole process, and others set them while a thread saves."""
    ema = ShardedEMA(nn.Linear(2, 2), 0.9)
    writing, asked = threading.Event(), threading.Event()
    original = os.fdatasync

    def held(descriptor: int) -> None:
        writing.set()
        asked.wait()
        original(descriptor)

    with warnings.catch_warnings():
        with patched("fdatasync", held):
            handle = ema.save(tmp_path / "x", step=0, asynchronous=True)
            writing.wait()
            warnings.filterwarnings("ignore", "said beside a save", UserWarning)
            asked.set()
            handle.result()
        warnings.warn("said beside a save", UserWarning, stacklevel=1)  # else an error here
    ema.close()


def saves_that_follow(folder: str) -> None:
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    handles = []
    for index in range(4):
        run.step(index)
        expected = full(ema)
        handles.append(ema.save(Path(folder, f"step_{index}"), step=index, asynchronous=True))
        assert all(handle.done() for handle in handles[:-1]), "one save at a time"
        size = ema.memory["staging"]
    assert ema.memory["staging"] == size, "the buffer is used again"
    ema.load(Path(folder, "step_3"))  # waits for it
    assert handles[-1].done()
    assert_equal(averages(ema), expected)
    ema.save(Path(folder, "last"), step=9, asynchronous=True)
    ema.close()  # waits, too
    assert Path(folder, "last", "manifest.json").is_file()


def test_one_save_at_a_time_and_close_waits(worlds: Worlds, tmp_path: Path) -> None:
    worlds[2].run(saves_that_follow, str(tmp_path))


def told_once(folder: str) -> list[tuple[str, str]]:
    """Where the failure of a save in the background comes to light, on each rank."""
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    told = []

    def fails(descriptor: int) -> None:
        if rank() == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def broken(name: str) -> Any:
        with patched("fdatasync", fails):
            handle = ema.save(Path(folder, name), step=1, asynchronous=True)
            while not handle.done():
                handle._future.exception()
        return handle

    def expect(call: Callable[[], Any]) -> None:
        with pytest.raises(CheckpointWriteError) as caught:
            call()
        told.append((type(caught.value).__name__, str(caught.value)))

    expect(broken("a").result)
    run.step(0)
    ema.save(Path(folder, "b"), step=1)  # result() has told it already
    broken("c")
    run.step(1)  # training goes on
    expect(lambda: ema.save(Path(folder, "d"), step=1))
    ema.save(Path(folder, "d"), step=1)
    broken("e")
    expect(lambda: ema.load(Path(folder, "b")))
    assert ema.load(Path(folder, "b")) == 1
    broken("f")
    expect(ema.close)
    ema.close()
    return told


def test_a_failure_in_the_background_is_told_once_on_all(worlds: Worlds, tmp_path: Path) -> None:
    for told in worlds[2].run(told_once, str(tmp_path)):
        assert len(told) == 4
        assert all("rank 1" in text and "Input/output error" in text for _, text in told)
    assert {p.name for p in tmp_path.iterdir()} == {"b", "d", "latest"}


def full_disk(folder: str, name: str, asynchronous: bool) -> str:
    """Save until a small disk is full, then make room."""
    run = build("ddp")
    ema = ShardedEMA(run.target, 0.9, shard_replicas=False)
    expected = full(ema)
    for step in range(100):
        try:
            ema.save(
                Path(folder, f"step_{step}"), step=step, format=name, asynchronous=asynchronous
            ).result()
        except EMAError as error:
            found = f"{type(error).__name__}: {error}"
            break
    assert step > 0
    run.step(0)  # neither model nor average are harmed
    assert_equal(averages(ema), expected)
    for index in range(step):
        assert ema.load(Path(folder, f"step_{index}"), verify=True) == index
    dist.barrier()
    if rank() == 0:
        shutil.rmtree(Path(folder, "step_0"))
    dist.barrier()
    ema.save(Path(folder, "again"), step=1, format=name)
    ema.close()
    return found


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk of {size} cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize(("name", "asynchronous"), [("safetensors", True), ("dcp", False)])
def test_full_disk(worlds: Worlds, name: str, asynchronous: bool, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m"):
        found = worlds[2].run(full_disk, str(tmp_path / "disk"), name, asynchronous)
        left = {p.name for p in (tmp_path / "disk").iterdir()}
    assert len(set(found)) == 1, "every rank says the same"
    assert found[0].startswith(CheckpointWriteError.__name__)
    assert "No space left on device" in found[0] and "rank" in found[0]
    assert not [entry for entry in left if "tmp" in entry], "what was begun is removed"


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def read_only(folder: str) -> str:
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.save(Path(folder, "good"), step=1)
    dist.barrier()
    if rank() == 0:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    dist.barrier()
    found = error_of(lambda: ema.save(Path(folder, "bad"), step=2))
    assert ema.load(Path(folder, "good"), verify=True) == 1
    ema.close()
    return found


def test_read_only_directory(worlds: Worlds, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m"):
        found = worlds[2].run(read_only, str(tmp_path / "disk"))
    assert len(set(found)) == 1 and "Read-only file system" in found[0]
    assert found[0].startswith(CheckpointWriteError.__name__)


def vanishing(folder: str) -> str:
    """Rank 1 loses the whole run directory while it writes."""
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)

    def vanish(descriptor: int) -> None:
        if rank() == 1:
            shutil.rmtree(folder)

    with patched("fdatasync", vanish):
        found = error_of(lambda: ema.save(Path(folder, "bad"), step=2))
    run.step(0)
    ema.update()
    ema.save(Path(folder, "good"), step=2)
    assert ema.load(Path(folder, "good"), verify=True) == 2
    ema.close()
    return found


def test_directory_that_vanishes(worlds: Worlds, tmp_path: Path) -> None:
    found = worlds[2].run(vanishing, str(tmp_path / "run"))
    assert len(set(found)) == 1 and "No such file or directory" in found[0]
    assert found[0].startswith(CheckpointWriteError.__name__)


PROGRAM = """
import os, sys, threading
import torch
import torch.distributed as dist
from sharded_ema import ShardedEMA
from sharded_ema.checkpoint import durable

durable.FLUSH_BYTES = 1
if {world} > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
ema = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
original = os.fdatasync
going = threading.Event()

def held(descriptor):
    {hold}
    original(descriptor)

os.fdatasync = held
ema.save(sys.argv[1], step=7, asynchronous=True)
{end}
"""


@pytest.mark.slow
def test_the_interpreter_waits_for_a_save(tmp_path: Path) -> None:
    hold = "threading.main_thread().join()"  # until the program has ended
    script = textwrap.dedent(PROGRAM.format(world=1, hold=hold, end=""))
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=True)
    ema = ShardedEMA(build("plain").target, 0.9)
    assert (tmp_path / "x" / "manifest.json").is_file()
    ema.close()


@pytest.mark.slow
def test_a_group_destroyed_before_close_is_a_named_error(tmp_path: Path) -> None:
    end = """
dist.destroy_process_group()
going.set()
try:
    ema.close()
except Exception as error:
    print(type(error).__name__, error)
"""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(world=2, hold="going.wait()", end=end))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(program), str(tmp_path / "x")],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert run.stdout.count("CheckpointWriteError") == 2, run.stdout + run.stderr
    assert "destroyed before close()" in run.stdout
    assert not (tmp_path / "x").exists()


def save_to_url(url: str) -> str:
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    expected = full(ema)
    ema.save(f"{url}/step_1", step=1)
    ema.save(f"{url}/step_2", step=2, asynchronous=True, keep_last=1).result()
    run.step(0)
    ema.update()
    assert ema.load(f"{url}/latest", verify=True) == 2
    assert_equal(averages(ema), expected)
    found = error_of(lambda: ema.save(f"{url}/step_2", step=3))
    ema.close()
    return found


def test_ranks_save_to_a_url(worlds: Worlds, tmp_path: Path) -> None:
    found = worlds[2].run(save_to_url, f"file://{tmp_path}/run")
    assert len(set(found)) == 1 and found[0].startswith("CheckpointExistsError")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"step_2", "latest"}
    place = tmp_path / "run" / "step_2"
    uuid = json.loads((place / "manifest.json").read_bytes())["uuid"]
    assert {p.name for p in place.iterdir()} == {
        "manifest.json",
        f"chunks-{uuid}.safetensors",
        *(f"shard-0000{rank}-{uuid}.safetensors" for rank in range(2)),
    }


def test_the_latest_is_found_where_training_stacks_put_it(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(3, 2), 0.9)
    places = (
        "checkpoint-2/ema",  # transformers
        "checkpoint-10/ema",
        "checkpoints/checkpoint_0/ema",  # accelerate
        "checkpoints/last.ckpt.ema",  # Lightning
        "global_step12/ema",  # DeepSpeed
    )
    for step, place in enumerate(places):
        ema.save(tmp_path / place, step=step, latest=False)
        assert latest_checkpoint(tmp_path) == tmp_path / place
        assert ema.load(latest_checkpoint(tmp_path)) == step
