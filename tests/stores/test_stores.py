"""Saves and loads against real servers: ranks, kills at any request, two jobs, and faults."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from sharded_ema import (
    ShardedEMA,
    average,
    consolidate,
    inspect,
    latest_checkpoint,
    verify,
)
from sharded_ema.checkpoint.run import committed
from sharded_ema.cli import main
from sharded_ema.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
    CheckpointWriteError,
    EMAError,
)
from sharded_ema.tools.watch import watch
from tests.checkpoint.test_saving import full
from tests.helpers import store_jobs
from tests.helpers.layouts import assert_equal, build
from tests.helpers.pool import WorkerPool
from tests.helpers.store_jobs import Jobs, value_of
from tests.helpers.stores import BUCKET, Proxy, Request, Store
from tests.model.sources.test_average import averages

pytestmark = [
    pytest.mark.stores,
    # Drivers leave connections to the end of the process.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Worlds = dict[int, WorkerPool]


@pytest.fixture(scope="module")
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A directory of the bucket for one test."""
    return re.sub(r"\W+", "_", request.node.name)


def names(store: Store, path: str) -> set[str]:
    fs = fsspec.filesystem(store.kind)
    fs.invalidate_cache()
    url = store.url(path)
    return {n.rpartition("/")[2] for n in fs.ls(url, detail=False)} if fs.isdir(url) else set()


def contents(store: Store, path: str) -> dict[str, bytes]:
    fs = fsspec.filesystem(store.kind)
    return {name: fs.cat_file(store.url(f"{path}/{name}")) for name in names(store, path)}


# ---------------------------------------------------------------------- what works


def test_tools(store: Store, run: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store_jobs.average(float(step)).save(
            store.url(f"{run}/step_{step}"), step=step, asynchronous=step == 2
        ).result()
    root = store.url(run)
    assert latest_checkpoint(root) == store.url(f"{run}/step_3")
    assert [c.step for c in committed(root)] == [1, 2, 3]
    assert [value_of(f"{root}/{name}") for name in ("step_1", "latest")] == [1.0, 3.0]
    assert verify(f"{root}/step_2").ok and inspect(root).ok
    assert main(["inspect", f"{root}/step_1/"]) == 0, "with a slash at its end"
    assert consolidate(f"{root}/step_2", tmp_path / "out", progress=False).ok
    assert (load_file(tmp_path / "out" / "model.safetensors")["bias"] == 2.0).all()
    average([f"{root}/step_1", f"{root}/step_3"], out=tmp_path / "mean", progress=False)
    assert (load_file(tmp_path / "mean" / "model.safetensors")["weight"] == 2.0).all()
    list(watch(root, tmp_path / "served", once=True))
    assert (load_file(tmp_path / "served" / "latest" / "model.safetensors")["bias"] == 3.0).all()
    before = contents(store, f"{run}/step_1")
    with pytest.raises(CheckpointExistsError):
        store_jobs.average(9.0).save(f"{root}/step_1", step=9)
    assert contents(store, f"{run}/step_1") == before


def test_folder_markers_are_no_damage(store: Store, run: str) -> None:
    fs = fsspec.filesystem(store.kind)
    url = store.url(f"{run}/step_1")
    if store.kind == "s3":  # as the console of AWS makes one
        fs.call_s3("put_object", Bucket=BUCKET, Key=f"{run}/step_1/", Body=b"")
    store_jobs.average(1.0).save(url, step=1)
    assert verify(url).ok and value_of(url) == 1.0


def save_from_ranks(store: Store, run: str, asynchronous: bool) -> None:
    store.connect()
    here = build("fsdp2")
    ema = ShardedEMA(here.target, 0.9)
    expected = full(ema)
    ema.save(store.url(f"{run}/step_1"), step=1, asynchronous=asynchronous).result()
    here.step(0)
    ema.update()
    assert ema.load(store.url(f"{run}/step_1"), verify=True) == 1
    assert_equal(averages(ema), expected)
    ema.close()


def load_on_ranks(store: Store, run: str) -> None:
    store.connect()
    here = build("fsdp2")
    ema = ShardedEMA(here.target, 0.9)
    expected = full(ema)
    here.step(0)
    ema.update()
    assert ema.load(store.url(f"{run}/step_1"), verify=True) == 1
    assert_equal(averages(ema), expected)
    ema.close()


@pytest.mark.parametrize(
    ("size", "other", "asynchronous"),
    [
        (2, 3, True),
        pytest.param(3, 2, False, marks=pytest.mark.long),
        pytest.param(4, 1, True, marks=pytest.mark.long),
        pytest.param(4, 2, False, marks=pytest.mark.long),
    ],
)
def test_ranks(
    store: Store, run: str, worlds: Worlds, size: int, other: int, asynchronous: bool
) -> None:
    worlds[size].run(save_from_ranks, store, run, asynchronous)
    assert verify(store.url(f"{run}/step_1")).ok
    worlds[other].run(load_on_ranks, store, run)


# ---------------------------------------------------------------------- what goes wrong


def kill(proxy: Proxy, jobs: Jobs, run: str, asynchronous: bool, moments: Any) -> set[str]:
    """Kill a save at requests, before or after them; what became of the checkpoints."""
    store = proxy.store
    for name in ("first", "whole"):  # what lies beside a checkpoint is looked at
        proxy.reset()
        assert jobs.run(store, [(f"{run}/{name}", 1.0, asynchronous)]) == [["saved"]]
    calls = len(proxy.seen)
    met = set()
    for number, after in moments(calls):
        path, victim = f"{run}/{number}-{after}", []

        def rule(request: Request) -> str:
            if request.number == number:  # noqa: B023
                if after:  # noqa: B023
                    return "cut after"
                os.kill(victim[0], signal.SIGKILL)  # noqa: B023
                return "cut"
            if request.number > number and victim:  # noqa: B023
                os.kill(victim[0], signal.SIGKILL)  # noqa: B023
                return "cut"
            return ""

        proxy.reset(rule)
        killed = jobs.is_killed(store, (path, 2.0, asynchronous), victim)
        proxy.reset()
        is_there = "manifest.json" in names(store, path)
        assert is_there or killed, "who says that it has saved has"
        if is_there:
            assert value_of(store.url(path)) == 2.0
            met.add("committed")
        else:
            with pytest.raises((CheckpointNotFoundError, CheckpointUncommittedError)):
                value_of(store.url(path))
            met.add("parts" if names(store, path) else "nothing")
            store_jobs.average(3.0).save(store.url(path), step=3)
            assert value_of(store.url(path)) == 3.0 and verify(store.url(path)).ok
        assert value_of(store.url(f"{run}/whole")) == 1.0
    return met


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", [False])
def test_kills(proxy: Proxy, jobs: Jobs, run: str, asynchronous: bool) -> None:
    met = kill(proxy, jobs, run, asynchronous, lambda calls: [(calls // 2, False)])
    assert met <= {"nothing", "parts", "committed"}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_kills_at_every_request(proxy: Proxy, jobs: Jobs, run: str, asynchronous: bool) -> None:
    met = kill(
        proxy, jobs, run, asynchronous,
        lambda calls: [(n, after) for n in range(1, calls + 1) for after in (False, True)],
    )  # fmt: skip
    assert met == {"nothing", "parts", "committed"}


@pytest.mark.parametrize("saves", [2, pytest.param(20, marks=pytest.mark.long)])
def test_two_jobs_on_one_url(store: Store, jobs: Jobs, run: str, saves: int) -> None:
    values = (100.0, 200.0)
    first, second = jobs.run(
        store, *([(f"{run}/step_{n}", value + n, False) for n in range(saves)] for value in values)
    )
    for number, both in enumerate(zip(first, second, strict=True)):
        path = f"{run}/step_{number}"
        words = sorted(word.partition(":")[0] for word in both)
        assert words == ["CheckpointExistsError", "saved"], both
        assert value_of(store.url(path)) == values[both.index("saved")] + number
        assert verify(store.url(path)).ok
        assert len(names(store, path)) == 3, "who gives up takes its own objects away"


FAULTS = {"forbidden": "403", "reset": "cut", "unavailable": "503", "broken": "500"}
# Clients try again.
SLOW_FAULTS = ("reset", "unavailable", "broken")


@pytest.fixture
def impatient(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A driver that tries twice."""
    if proxy.store.kind == "s3":
        import s3fs

        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    yield proxy


def one_line(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(list(command)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "fault", ["forbidden", *(pytest.param(f, marks=pytest.mark.long) for f in SLOW_FAULTS)]
)
def test_faults(impatient: Proxy, run: str, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 2, a named error, and nothing that was there is lost."""
    proxy, store = impatient, impatient.store
    if store.kind != "s3":
        pytest.skip("the client of Azure tries again for minutes, and no setting of adlfs ends it")
    url, other = store.url(f"{run}/step_1"), store.url(f"{run}/step_2")
    store_jobs.average(1.0).save(url, step=1)
    before = contents(store, f"{run}/step_1")
    proxy.reset(lambda request: FAULTS[fault])
    assert url in one_line(capsys, "inspect", url)
    assert url in one_line(capsys, "verify", url)
    with pytest.raises(CheckpointError):
        value_of(url)
    with pytest.raises(EMAError):
        store_jobs.average(2.0).save(other, step=2)
    # One that passes by, and one that meets whatever is written.
    proxy.reset(lambda request: FAULTS[fault] if request.number == 2 else "")
    if fault in SLOW_FAULTS:
        assert value_of(url) == 1.0
    proxy.reset(lambda request: FAULTS[fault] if request.writes else "")
    with pytest.raises(EMAError):
        store_jobs.average(2.0).save(other, step=2)
    proxy.reset()
    assert contents(store, f"{run}/step_1") == before
    store_jobs.average(2.0).save(other, step=2)
    assert value_of(other) == 2.0 and value_of(url) == 1.0


def test_missing_bucket(store: Store, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = store.url(f"{run}/step_1", bucket="bukket")
    with pytest.raises(CheckpointWriteError, match="no bucket 'bukket'"):
        store_jobs.average(1.0).save(url, step=1)
    assert url in one_line(capsys, "inspect", url)
    assert not fsspec.filesystem(store.kind).exists("bukket")


def test_wrong_credentials(store: Store, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    if store.kind == "s3":
        pytest.skip("moto checks no signatures; test_faults has what S3 answers")
    url = store.url(f"{run}/step_1")
    store_jobs.average(1.0).save(url, step=1)
    try:
        replace(store, secret="A" * 86 + "==").connect()
        assert url in one_line(capsys, "inspect", url)
        with pytest.raises(EMAError):
            store_jobs.average(1.0).save(store.url(f"{run}/step_2"), step=1)
    finally:
        store.connect()
    assert value_of(url) == 1.0 and not names(store, f"{run}/step_2")


@pytest.mark.long
def test_unfinished_uploads_are_ended_and_listed(
    store: Store, proxy: Proxy, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.kind != "s3":
        pytest.skip("Azure forgets blocks that are part of no blob by itself, after a week")
    size = 6 << 20
    fs = proxy.store.connect(default_block_size=size)
    fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key=f"{run}/step_0/shard-of-a-dead-one")
    ema = ShardedEMA(torch.nn.Linear(1000, 4000), 0.9)  # 16 MB
    url = proxy.store.url(f"{run}/step_1")
    met = []

    def rule(request: Request) -> str:
        if "partNumber=2" in request.path:
            met.append(request)
            return "403"
        return ""

    proxy.reset(rule)
    with pytest.raises(CheckpointWriteError):
        ema.save(url, step=1)
    assert met
    proxy.reset()
    assert [u["Key"] for u in fs.list_multipart_uploads(BUCKET) if run in u["Key"]] == [
        f"{run}/step_0/shard-of-a-dead-one"
    ]
    assert not names(store, f"{run}/step_1")
    ema.save(url, step=1)
    assert verify(url).ok
    report = inspect(proxy.store.url(run))
    assert report.facts["unfinished_uploads"] == ["step_0/shard-of-a-dead-one"]
    assert "AbortIncompleteMultipartUpload" in report.text()
    assert "unfinished_uploads" not in inspect(url).facts


@pytest.mark.long
def test_random_cuts(impatient: Proxy, run: str) -> None:
    """Whatever requests are lost, what is there is whole, and it is if the save says so."""
    proxy, draw = impatient, random.Random(1)
    if proxy.store.kind != "s3":
        pytest.skip("the client of Azure tries again for minutes, and no setting of adlfs ends it")
    saved = 0
    for number in range(6):
        url, before = proxy.store.url(f"{run}/step_{number}"), saved
        proxy.reset(lambda request: draw.choice(["", "", "", "", "", "cut", "cut after", "503"]))
        try:
            store_jobs.average(float(number)).save(url, step=number)
            saved += 1
        except EMAError:
            pass
        proxy.reset()
        if "manifest.json" in names(proxy.store, f"{run}/step_{number}"):
            assert value_of(url) == float(number) and verify(url).ok
        else:
            assert saved == before, "who says that it has saved has"
    assert saved
