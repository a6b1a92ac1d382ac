"""Training on two machines, of which one dies: what is committed stays, what goes on is exact."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sharded_ema import ShardedEMA, consolidate, verify
from sharded_ema.checkpoint.holding import DEAD_AFTER_SECONDS
from tests.machines.machines import Job, Machine, poll, two_machines, why_not

pytestmark = pytest.mark.dist
LIMIT = 240.0  # a job that has not ended by then hangs; the slowest takes about a tenth of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machines")


@pytest.fixture(scope="module")
def machines(folder: Path) -> Iterator[Sequence[Machine]]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with two_machines(folder) as made:
        yield made


def start(machines: Sequence[Machine], job: Job, *flags: str) -> None:
    for machine in machines:
        machine.start(job, *flags)


def finish(machines: Sequence[Machine], job: Job) -> None:
    assert [machine.wait(LIMIT) for machine in machines] == [0, 0], job.said()


@pytest.fixture(scope="module")
def undisturbed(machines: Sequence[Machine], folder: Path) -> Job:
    """Nobody dies; a plain average is kept beside the library's."""
    job = Job(folder, "undisturbed")
    start(machines, job, "--compare")
    finish(machines, job)
    export(job)
    return job


def export(job: Job) -> None:
    """Make a model of the last average, after a look at everything that the run has left."""
    ema = job.shared / "ema"
    kept = [f"step_{step:06d}" for step in (20, 25, 30)]
    assert sorted(path.name for path in ema.iterdir()) == ["latest", *kept], "no leftovers"
    assert (ema / "latest").read_text().strip() == kept[-1]
    for name in kept:
        assert verify(ema / name).ok
    consolidate(ema / "latest", job.notes / "export", progress=False)


def silence(job: Job) -> None:
    """What a dead machine was writing goes at the first save after it was silent for long enough.

    Nobody can see from another machine that its process is dead, not even from its next life.
    """
    ema = job.shared / "ema"
    (left,) = ema.glob("*.tmp-*")
    for path in (*left.rglob("*"), left):
        before = path.stat().st_mtime - 2 * DEAD_AFTER_SECONDS
        os.utime(path, (before, before))
    ShardedEMA(torch.nn.Linear(1, 1), 0.9).save(ema / "later", step=40, latest=False)
    assert not left.exists()
    shutil.rmtree(ema / "later")


def average(job: Job) -> dict[str, torch.Tensor]:
    return load_file(job.notes / "export" / "model.safetensors")


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys() and want
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def assert_as_undisturbed(job: Job, undisturbed: Job) -> None:
    """Bit for bit: the average, and the weights."""
    export(job)
    assert_same(average(job), average(undisturbed))
    got, want = (load_file(each.notes / "weights.safetensors") for each in (job, undisturbed))
    assert_same(got, want)


def test_average_of_two_machines_is_the_plain_loop(undisturbed: Job) -> None:
    got = average(undisturbed)
    assert_same(got, load_file(undisturbed.notes / "plain.safetensors"))
    weights = load_file(undisturbed.notes / "weights.safetensors")
    assert any(not torch.equal(got[name], value) for name, value in weights.items())


def test_machine_killed_in_the_midst_of_a_save(
    machines: Sequence[Machine], folder: Path, undisturbed: Job
) -> None:
    """The other machine's worker fails, and both go on as soon as the machine is back."""
    job = Job(folder, "killed")
    start(machines, job, "--stand-still", "1")
    poll(job.notes / "standing", job, machines)
    machines[1].kill()
    machines[1].start(job)
    finish(machines, job)
    assert job.begun() == [[0, 10], [0, 10]], "the save of step 15 was not committed"
    assert_as_undisturbed(job, undisturbed)


@pytest.mark.long
def test_worker_terminated(machines: Sequence[Machine], folder: Path, undisturbed: Job) -> None:
    job = Job(folder, "terminated")
    start(machines, job, "--terminate", "1")
    finish(machines, job)
    first, second = job.begun()
    # The save of step 15 may have been under way.
    assert first == second and first in ([0, 15], [0, 10])
    assert_as_undisturbed(job, undisturbed)


@pytest.mark.long
def test_machine_of_the_rendezvous_killed_in_the_midst_of_a_save(
    machines: Sequence[Machine], folder: Path, undisturbed: Job
) -> None:
    """torchrun cannot go on without it; both are started again, as a scheduler would."""
    job = Job(folder, "head")
    start(machines, job, "--stand-still", "0")
    poll(job.notes / "standing", job, machines)
    machines[0].kill()
    assert machines[1].wait(LIMIT) != 0, "ends by itself"
    start(machines, job)
    finish(machines, job)
    assert job.begun() == [[0, 10], [0, 10]]
    silence(job)
    assert_as_undisturbed(job, undisturbed)


@pytest.mark.long
def test_directory_that_is_not_shared(machines: Sequence[Machine], folder: Path) -> None:
    """Each machine has a disk of its own there: an error by name on both, nothing committed."""
    job = Job(folder, "apart")
    disks = [folder / f"disk{machine.number}" for machine in machines]
    for machine, disk in zip(machines, disks, strict=True):
        disk.mkdir()
        machine.start(job, restarts=0, disk=disk)
    assert 0 not in [machine.wait(LIMIT) for machine in machines]
    for machine, disk in zip(machines, disks, strict=True):
        text = job.log(machine.number).read_text(errors="replace")
        assert "sharded_ema.errors.CheckpointWriteError" in text, text[-3000:]
        assert not list((disk / "ema").glob("step_*/manifest.json"))
