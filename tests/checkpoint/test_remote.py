"""Checkpoints at URLs. There is no rename there: the manifest, written last, is the commit.

``memory://`` lives in this process; ``file://`` stands in for a store that several ranks reach.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from safetensors.torch import load_file

from sharded_ema import (
    ShardedEMA,
    average,
    consolidate,
    diff,
    inspect,
    latest_checkpoint,
    synthesize,
    verify,
)
from sharded_ema.checkpoint import files, run
from sharded_ema.checkpoint.run import committed, open_checkpoint
from sharded_ema.cli import main
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointGoneError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
    CheckpointWriteError,
    ConfigError,
)


@pytest.fixture
def store() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


@pytest.fixture
def ema() -> ShardedEMA:
    torch.manual_seed(0)
    return ShardedEMA(torch.nn.Linear(3, 2), 0.9)


def names(store: Any, path: str) -> set[str]:
    return {entry.rpartition("/")[2] for entry in store.ls(path, detail=False)}


def content(store: Any, path: str) -> dict[str, bytes]:
    return {name: store.cat_file(f"{path}/{name}") for name in names(store, path)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip(store: Any, ema: ShardedEMA, asynchronous: bool, tmp_path: Path) -> None:
    url = "memory://run/step_1/"
    with torch.no_grad():
        ema._model.live()[0].fill_(2.0)
    ema.update()
    handle = ema.save(url, step=1, asynchronous=asynchronous)
    assert handle.result() == "memory://run/step_1"
    uuid = json.loads(store.cat_file("/run/step_1/manifest.json"))["uuid"]
    assert names(store, "/run/step_1") == {
        "manifest.json", f"chunks-{uuid}.safetensors", f"shard-00000-{uuid}.safetensors",
    }  # fmt: skip
    other = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    assert other.load(url, verify=True) == 1
    for key, value in ema.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert verify(url).ok
    assert inspect(url).ok
    assert consolidate(url, tmp_path / "out", progress=False).ok
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["weight"], ema.state_dict()["ema.weight"])
    assert main(["verify", url]) == 0


def test_latest_and_retention(store: Any, ema: ShardedEMA) -> None:
    ema.save("memory://run/best", step=0)
    for step in range(4):
        ema.save(f"memory://run/step_{step}", step=step, keep_last=2)
    assert names(store, "/run") == {"best", "step_2", "step_3", "latest"}
    assert latest_checkpoint("memory://run") == "memory://run/step_3"
    assert [c.step for c in committed("memory://run")] == [0, 2, 3]
    assert ema.load("memory://run/latest") == 3
    with pytest.raises(CheckpointNotFoundError):
        latest_checkpoint("memory://nowhere")


def test_what_is_there_stays(store: Any, ema: ShardedEMA) -> None:
    ema.save("memory://run/step_1", step=1)
    before = content(store, "/run/step_1")
    with pytest.raises(CheckpointExistsError, match="already exists"):
        ema.save("memory://run/step_1", step=2)
    with pytest.raises(ConfigError, match="replace=True needs a file system that renames"):
        ema.save("memory://run/step_1", step=2, replace=True)
    with pytest.raises(ConfigError, match="file systems only"):
        ema.save("memory://run/step_2", step=2, format="dcp")
    assert content(store, "/run/step_1") == before
    store.pipe_file("/run/letters/dear.txt", b"x")
    with pytest.raises(CheckpointExistsError):
        ema.save("memory://run/letters", step=2)
    assert names(store, "/run/letters") == {"dear.txt"}


def test_without_its_manifest_it_is_no_checkpoint(store: Any, ema: ShardedEMA) -> None:
    ema.save("memory://run/step_1", step=1)
    store.pipe_file("/run/step_1/shard-00007.safetensors", b"of a save by more ranks")
    store.rm_file("/run/step_1/manifest.json")
    with pytest.raises(CheckpointUncommittedError):
        ema.load("memory://run/step_1")
    left = names(store, "/run/step_1")
    ema.save("memory://run/step_1", step=2)
    # In nobody's way, and nobody can tell whether the save that wrote it is dead.
    assert left < names(store, "/run/step_1")
    assert ema.load("memory://run/step_1", verify=True) == 2
    assert verify("memory://run/step_1").ok
    ema.save("memory://run/step_2", step=3, keep_last=1)
    assert names(store, "/run/step_1") == left


def test_a_save_that_fails_leaves_nothing(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(store)._open

    def full(self: Any, path: str, *args: Any, **options: Any) -> Any:
        if "/chunks-" in path:
            raise OSError("the bucket is full")
        return real(self, path, *args, **options)

    monkeypatch.setattr(type(store), "_open", full)
    with pytest.raises(CheckpointWriteError, match="the bucket is full"):
        ema.save("memory://run/step_1", step=1)
    assert not store.exists("/run/step_1") or not names(store, "/run/step_1")
    monkeypatch.undo()
    ema.save("memory://run/step_1", step=1)


def test_damage_is_found(store: Any, ema: ShardedEMA) -> None:
    ema.save("memory://run/step_1", step=1)
    (name,) = (n for n in names(store, "/run/step_1") if n.startswith("shard-00000"))
    path = f"/run/step_1/{name}"
    good = store.cat_file(path)
    for position in (10, 4097, len(good) - 1):
        data = bytearray(good)
        data[position] ^= 4
        store.pipe_file(path, bytes(data))
        assert verify_fails("memory://run/step_1")
    store.pipe_file(path, good[:-1])
    assert verify_fails("memory://run/step_1")
    store.rm_file(path)
    with pytest.raises(CheckpointCorruptError, match=r"shard-00000-.*is missing"):
        ema.load("memory://run/step_1")


def race(ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch, condition: str = "mode") -> ShardedEMA:
    """Let another job save to the URL in the moment before the manifest of ``ema`` is put there.

    Args:
        condition: the argument by which the driver is told to put only what is not there.
    """
    first = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    pipe = MemoryFileSystem.pipe_file
    waiting = [lambda: first.save("memory://run/step_1", step=1)]

    def meanwhile(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if "manifest" in path and waiting:
            waiting.pop()()
        pipe(self, path, value, mode=mode)

    def as_azure_s(self: Any, path: str, value: bytes, overwrite: bool = True) -> None:
        meanwhile(self, path, value, mode="overwrite" if overwrite else "create")

    drivers = {"mode": meanwhile, "overwrite": as_azure_s}
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", drivers[condition])
    with pytest.raises(CheckpointExistsError, match="another job has saved to"):
        ema.save("memory://run/step_1", step=2)
    return first


@pytest.mark.parametrize("condition", ["mode", "overwrite"])
def test_of_two_jobs_that_save_to_one_url_the_first_one_commits(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    first = race(ema, monkeypatch, condition)
    other = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    assert other.load("memory://run/step_1", verify=True) == 1
    for key, value in first.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert len(names(store, "/run/step_1")) == 3, "who gives up takes its own objects away"


def test_drivers_that_remember_what_they_have_listed(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of S3 does: the manifest of the other job came after the look at the directory."""
    ls, cat, listed = MemoryFileSystem.ls, MemoryFileSystem.cat_file, []

    def remembering(self: Any, path: str, detail: bool = True, **options: Any) -> Any:
        listed[:] = ls(self, path, detail=False, **options)
        return ls(self, path, detail=detail, **options)

    def from_memory(self: Any, path: str, *args: Any, **options: Any) -> bytes:
        if listed and self._strip_protocol(path) not in listed:
            raise FileNotFoundError(path)
        return cat(self, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", remembering)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", from_memory)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda *_: listed.clear())
    race(ema, monkeypatch)
    assert ShardedEMA(torch.nn.Linear(3, 2), 0.9).load("memory://run/step_1", verify=True) == 1
    assert len(names(store, "/run/step_1")) == 3, "who gives up takes its own objects away"


def test_a_save_does_not_touch_what_another_one_is_writing(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe_file(f"/run/step_1/shard-00000-{'a' * 32}.safetensors", b"of a living one")
    ema.save("memory://run/step_1", step=1)
    assert verify("memory://run/step_1").ok
    assert len(names(store, "/run/step_1")) == 4

    def refuses(self: Any, path: str, value: bytes, **options: Any) -> None:
        raise OSError("no room for it")

    store.pipe_file(f"/run/step_2/chunks-{'a' * 32}.safetensors", b"of a living one")
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuses)
    with pytest.raises(CheckpointWriteError, match="no room for it"):
        ema.save("memory://run/step_2", step=2)
    assert names(store, "/run/step_2") == {f"chunks-{'a' * 32}.safetensors"}


def test_a_manifest_that_was_put_in_spite_of_an_error_is_a_commit(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = MemoryFileSystem.pipe_file

    def lost_answer(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        pipe(self, path, value, mode=mode)
        if "manifest" in path:
            raise FileExistsError("412: sent again by the client")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lost_answer)
    ema.save("memory://run/step_1", step=1)
    assert ema.load("memory://run/step_1", verify=True) == 1


def test_an_object_that_marks_a_folder_is_no_file(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    ls = MemoryFileSystem.ls

    def with_marker(self: Any, path: str, detail: bool = True, **options: Any) -> Any:
        """As drivers of stores list a folder that has one."""
        found = ls(self, path, detail=detail, **options)
        return found if detail else [f"{self._strip_protocol(path)}/", *found]

    monkeypatch.setattr(MemoryFileSystem, "ls", with_marker)
    ema.save("memory://run/step_1", step=1)
    assert verify("memory://run/step_1").ok
    assert ema.load("memory://run/step_1") == 1


def test_what_a_client_of_a_store_raises_is_an_error_of_this_library(
    store: Any,
    ema: ShardedEMA,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class NoCredentialsError(Exception):
        __module__ = "botocore.exceptions"

    def fails(self: Any, path: str, **options: Any) -> bool:
        raise NoCredentialsError("no\ncredentials")

    monkeypatch.setattr(MemoryFileSystem, "isdir", fails)
    assert main(["inspect", "memory://run/step_1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory://run/step_1 cannot be reached: no credentials" in line
    with pytest.raises(CheckpointError, match="cannot be reached"):
        ema.save("memory://run/step_1", step=1)


def test_no_bucket_is_made(store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BUCKETS", {"memory"})
    with pytest.raises(CheckpointWriteError, match="there is no bucket 'bukket'"):
        ema.save("memory://bukket/step_1", step=1)
    assert not store.exists("/bukket")


def verify_fails(url: str) -> bool:
    report = verify(url)
    return not report.ok and bool(report.problems)


def steps(path: str, *names: str) -> None:
    """A run of a few checkpoints, saved in each of several ways to name them."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    ema = ShardedEMA(layer, {"ema": "power:0.05", "wide": "power:0.1"})
    for step in range(1, 9):
        with torch.no_grad():
            layer.weight += step
        ema.update()
        for name in names:
            ema.save(f"{path}/{name.format(step)}", step=step)


def test_tools_of_several_checkpoints(store: Any, tmp_path: Path) -> None:
    url, here = "memory://run", tmp_path / "run"
    steps(url, "checkpoints/step_{}/ema")
    store.get("/run", str(here), recursive=True)
    first, last = (f"checkpoints/step_{step}/ema" for step in (1, 8))
    assert diff(f"{url}/{last}", here / last).ok
    assert not diff(here / first, f"{url}/{last}").ok
    average([f"{url}/{first}", f"{url}/{last}"], out=tmp_path / "a", progress=False)
    average([here / first, here / last], out=tmp_path / "b", progress=False)
    average([here / first, f"{url}/{last}"], out=tmp_path / "c", progress=False)
    assert diff(tmp_path / "a", tmp_path / "b").ok and diff(tmp_path / "c", tmp_path / "b").ok
    settings: dict[str, Any] = {"sigma_rel": 0.07, "progress": False, "max_residual": 0.9}
    built = synthesize(url, out=tmp_path / "d", **settings)
    assert built.facts["snapshots"] == list(range(1, 9))
    synthesize(here, out=tmp_path / "e", **settings)
    name = built.facts["widths"]["0.07"]["output"]
    assert diff(tmp_path / "d" / name, tmp_path / "e" / name).ok
    with pytest.raises(CheckpointNotFoundError, match="there is no run at memory://nothing"):
        synthesize("memory://nothing", out=tmp_path / "f", **settings)


def test_the_directory_of_an_engine(store: Any, ema: ShardedEMA, tmp_path: Path) -> None:
    ema.save("memory://run/step_1/ema", step=1)  # with a file latest of its own in step_1
    store.pipe_file("/run/latest", b"step_1")
    for number, place in enumerate(("memory://run", "memory://run/step_1", "memory://run/latest")):
        out = tmp_path / f"out{number}"
        assert consolidate(place, out, progress=False).facts["step"] == 1
        assert verify(place).facts["metadata"] == "verified"
    assert inspect("memory://run/latest").facts["averages"][0]["step"] == 1
    assert "checkpoints" in inspect("memory://run").facts
    store.pipe_file("/other/step_1/zero_pp_rank_0_mp_rank_00_model_states.pt", b"")
    with pytest.raises(CheckpointNotFoundError, match="of DeepSpeed without an average"):
        consolidate("memory://other/step_1", tmp_path / "out", progress=False)


def test_what_must_lie_on_this_machine(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step_1"
    ema = ShardedEMA(torch.nn.Linear(3, 2), "power:0.1")
    ema.update()
    ema.save(path, step=1)
    url = "memory://models/m"
    for call in (
        lambda: consolidate(path, url),
        lambda: consolidate(path, "out", like=url),
        lambda: consolidate(path, "out", base=url),
        lambda: average([path], out=url),
        lambda: average([path], out="out", like=url),
        lambda: synthesize(tmp_path, sigma_rel=0.1, out=url),
    ):
        with pytest.raises(ConfigError, match=f"got the URL {url}"):
            call()
    with pytest.raises(CheckpointNotFoundError, match=url):
        diff(path, url)
    # As a path, a URL would name directories here.
    assert {entry.name for entry in tmp_path.iterdir()} == {"step_1", "latest"}


@pytest.mark.parametrize("url", ["nothing://bucket/run", "without://bucket/run"])
def test_without_a_driver(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = {"class": "no_such_module.Driver", "err": "Install no_such_module"}
    monkeypatch.setitem(known_implementations, "without", driver)
    assert main(["inspect", url]) == 2
    assert capsys.readouterr().err.startswith(f"sharded-ema: error: {url} cannot be reached: ")
    with pytest.raises(ConfigError, match=r"Install|not known"):
        verify(url)


def test_what_a_store_lets_vanish_between_open_and_read_is_gone(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """keep_last removes the manifest of an old checkpoint just then; nothing is damaged."""
    url = "memory://run/step_1"
    ema.save(url, step=1)
    read, vanishing = files._RemoteFile._read_at, [1]

    def read_at(file: files._RemoteFile, view: memoryview, position: int) -> int:
        if vanishing[0]:
            vanishing[0] -= 1
            raise FileNotFoundError("The specified key does not exist.")
        return read(file, view, position)

    monkeypatch.setattr(files._RemoteFile, "_read_at", read_at)
    with open_checkpoint(url):  # another try of its own
        assert not vanishing[0]
    vanishing[0] = 1
    assert ema.load(url) == 1
    vanishing[0] = 1 << 30
    with pytest.raises(CheckpointGoneError, match="removed or replaced while it was read"):
        open_checkpoint(url)
    with pytest.raises(CheckpointNotFoundError, match="so it went"):
        ema.load(url)


def test_a_manifest_that_vanishes_after_it_was_listed(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of names and the manifest keep_last has begun to remove the checkpoint."""
    url = "memory://run/step_1"
    ema.save(url, step=1)
    find = run.find_checkpoint

    def find_and_remove(*arguments: Any) -> Any:
        found = find(*arguments)
        store.rm(f"{url}/manifest.json")
        return found

    monkeypatch.setattr(run, "find_checkpoint", find_and_remove)
    with pytest.raises(CheckpointGoneError, match="removed or replaced while it was read"):
        ema.load(url)
