"""A consolidation that several processes share: the same bytes, whoever does what, and dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharded_ema.cli import main
from sharded_ema.errors import CheckpointExistsError, CheckpointWriteError, ConfigError
from sharded_ema.tools import parts
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.parts import Part
from sharded_ema.tools.workplace import Workplace
from tests.helpers.checkpoints import flip, make, rows

OPTIONS: dict[str, Any] = {"max_shard_size": 500, "progress": False}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"ema.w{i}": np.arange(100, dtype="f4").reshape(20, 5) + i for i in range(7)}
    return make(tmp_path / "c", tensors, rows(3))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    assert consolidate(source, tmp_path / "reference", **OPTIONS).ok
    found = contents(tmp_path / "reference")
    assert len(found) == 8, "seven files and their index"
    shutil.rmtree(tmp_path / "reference")
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_the_same_bytes_whatever_the_number(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], count: int
) -> None:
    """Threads stand for processes: each has a workplace of its own for each file."""

    def one(index: int) -> bool:
        return consolidate(source, tmp_path / "out", part=f"{index}/{count}", **OPTIONS).ok

    with ThreadPoolExecutor(count) as pool:
        assert all(pool.map(one, range(count)))
    assert contents(tmp_path / "out") == wanted
    assert names(tmp_path) == {"c", "out"}
    # One that comes late, as when its node was slow to start.
    assert consolidate(source, tmp_path / "out", part="1/2", **OPTIONS).ok


@pytest.mark.parametrize("removed", ["model-00003-of-00007.safetensors", "all"])
def test_another_publishes_while_this_one_gathers(
    source: Path,
    tmp_path: Path,
    removed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two files of this one the other makes the target and begins to clean up."""
    record, gather = Workplace.record, parts._Shared.gather

    def gathering(shared: Any, place: Workplace, folder: Path) -> None:
        def late(place: Workplace, name: str, *line: Any) -> None:
            record(place, name, *line)
            if name == "model-00002-of-00007.safetensors":
                shutil.copytree(place.model, tmp_path / "out")
                shutil.rmtree(shared._folder if removed == "all" else shared._folder / removed)

        monkeypatch.setattr(Workplace, "record", late)
        gather(shared, place, folder)

    monkeypatch.setattr(parts._Shared, "gather", gathering)
    assert consolidate(source, tmp_path / "out", part="0/2", **OPTIONS).ok
    assert names(tmp_path) == {"c", "out"}, "what is left is the other one's"


def test_what_is_there_and_is_something_else_is_refused(source: Path, tmp_path: Path) -> None:
    assert consolidate(source, tmp_path / "out", part="0/2", **OPTIONS).ok
    with pytest.raises(CheckpointExistsError):
        consolidate(source, tmp_path / "out", part="0/2", dtype="float16", **OPTIONS)
    (tmp_path / "out" / "model-00003-of-00007.safetensors").unlink()
    with pytest.raises(CheckpointExistsError):
        consolidate(source, tmp_path / "out", part="0/2", **OPTIONS)


def test_each_begins_elsewhere_and_does_what_nobody_does() -> None:
    files = [f"f{i}" for i in range(7)]
    begun = [Part(index, 3).in_order(files) for index in range(3)]
    assert [order[0] for order in begun] == ["f0", "f2", "f4"]
    assert all(sorted(order) == files for order in begun)


KILLED = """
import os, signal, sys
from sharded_ema.cli import main
from sharded_ema.tools.workplace import Workplace
finished = 0
publish = Workplace.publish
def killed(place):
    global finished
    if finished == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    publish(place)
    finished += 1
Workplace.publish = killed
main(sys.argv[2:])
"""


@pytest.mark.parametrize("after", [0, 3, 7], ids=["at once", "midway", "before the end"])
def test_one_that_dies_is_taken_up(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], after: int
) -> None:
    arguments = ["consolidate", str(source), str(tmp_path / "out"), "--max-shard-size", "500"]
    command = [*arguments, "--no-progress", "--part", "0/2"]
    ended = subprocess.run([sys.executable, "-c", KILLED, str(after), *command], check=False)
    assert ended.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    report = consolidate(source, tmp_path / "out", part="1/2", **OPTIONS)
    assert report.ok and report.facts["taken_over"] == min(after, 7)
    assert contents(tmp_path / "out") == wanted and names(tmp_path) == {"c", "out"}


def test_what_was_damaged_since_is_written_again(
    source: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    command = ["consolidate", str(source), str(tmp_path / "out"), "--max-shard-size", "500"]
    command += ["--no-progress", "--part", "0/2"]
    subprocess.run([sys.executable, "-c", KILLED, "3", *command], check=False)
    (file,) = tmp_path.glob("out.tmp-*/model/model-00002-of-00007.safetensors/*.safetensors")
    flip(file, 300)
    assert consolidate(source, tmp_path / "out", part="1/2", **OPTIONS).ok
    assert contents(tmp_path / "out") == wanted


def test_who_is_at_work_is_waited_for(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write = parts.write_file

    def slow(name: str, *arguments: Any) -> Any:
        if name.startswith("model-00001") and not begun.is_set():
            begun.set()
            assert go_on.wait(60)
        return write(name, *arguments)

    def look(event: threading.Event, seconds: float | None = None) -> bool:
        go_on.set()
        return waits(event, 0.01)

    waits = threading.Event.wait
    monkeypatch.setattr(parts, "write_file", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(consolidate, source, tmp_path / "out", part="0/2", **OPTIONS)
        assert begun.wait(60)
        monkeypatch.setattr(parts.threading.Event, "wait", look)
        assert consolidate(source, tmp_path / "out", part="1/2", **OPTIONS).ok
        assert first.result().ok
    assert contents(tmp_path / "out") == wanted and names(tmp_path) == {"c", "out"}


def test_without_hard_links(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    assert consolidate(source, tmp_path / "out", part="0/1", **OPTIONS).ok
    assert contents(tmp_path / "out") == wanted


def test_a_planted_link_is_refused(source: Path, tmp_path: Path) -> None:
    command = ["consolidate", str(source), str(tmp_path / "out"), "--max-shard-size", "500"]
    command += ["--no-progress", "--part", "0/2"]
    subprocess.run([sys.executable, "-c", KILLED, "3", *command], check=False)
    (file,) = tmp_path.glob("out.tmp-*/model/model-00002-of-00007.safetensors/*.safetensors")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointWriteError, match="it is a link"):
        consolidate(source, tmp_path / "out", part="1/2", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_arguments(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("2/2", "-1/2", "1", "1/", "a/b", "0/0"):
        with pytest.raises(ConfigError, match="part must be I/N"):
            consolidate(source, tmp_path / "out", part=wrong)
    with pytest.raises(ConfigError, match="part goes with"):
        consolidate(source, tmp_path / "out", part="0/2", format="torch")
    for name, value in {"RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert Part.of_torchrun(os.environ) is None, "those are the variables of any training"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert Part.of_torchrun(os.environ) == "1/3"
    assert main(["consolidate", str(source), str(tmp_path / "out"), "--no-progress"]) == 0
    assert names(tmp_path) == {"c", "out"}
