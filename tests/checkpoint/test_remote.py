"""Checkpoints at URLs. There is no rename there: the manifest, written last, is the commit.

``memory://`` lives in this process; ``file://`` stands in for a store that several ranks reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
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
from sharded_ema.checkpoint.run import committed
from sharded_ema.cli import main
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointExistsError,
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
    assert names(store, "/run/step_1") == {
        "manifest.json", "chunks.safetensors", "shard-00000.safetensors",
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
    ema.save("memory://run/step_1", step=2)  # what a killed save has left is in nobody's way
    assert "shard-00007.safetensors" not in names(store, "/run/step_1")
    assert ema.load("memory://run/step_1", verify=True) == 2


def test_a_save_that_fails_leaves_nothing(
    store: Any, ema: ShardedEMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = type(store).pipe_file

    def full(self: Any, path: str, value: bytes, **options: Any) -> None:
        if path.endswith("chunks.safetensors"):
            raise OSError("the bucket is full")
        pipe(self, path, value, **options)

    monkeypatch.setattr(type(store), "pipe_file", full)
    with pytest.raises(CheckpointWriteError, match="the bucket is full"):
        ema.save("memory://run/step_1", step=1)
    assert not store.exists("/run/step_1") or not names(store, "/run/step_1")
    monkeypatch.undo()
    ema.save("memory://run/step_1", step=1)


def test_damage_is_found(store: Any, ema: ShardedEMA) -> None:
    ema.save("memory://run/step_1", step=1)
    path = "/run/step_1/shard-00000.safetensors"
    good = store.cat_file(path)
    for position in (10, 4097, len(good) - 1):
        data = bytearray(good)
        data[position] ^= 4
        store.pipe_file(path, bytes(data))
        assert verify_fails("memory://run/step_1")
    store.pipe_file(path, good[:-1])
    assert verify_fails("memory://run/step_1")
    store.rm_file(path)
    with pytest.raises(CheckpointCorruptError, match=r"shard-00000\.safetensors is missing"):
        ema.load("memory://run/step_1")


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
    assert inspect("memory://run/latest").facts["average"]["step"] == 1
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
