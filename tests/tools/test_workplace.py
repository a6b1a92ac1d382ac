"""Consolidations that are killed: nothing half-made is ever seen, and the next one goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from sharded_ema.checkpoint import removal
from sharded_ema.checkpoint.holding import Hold
from sharded_ema.errors import CheckpointExistsError, CheckpointWriteError
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.workplace import Workplace
from tests.helpers.checkpoints import make, rows
from tests.helpers.crash import PRELOADED, TIMEOUT, serve_consolidations

OPTIONS: dict[str, Any] = {"max_shard_size": 300, "progress": False}


def source(path: Path) -> Path:
    tensors = {f"ema.w{i}": np.arange(60, dtype="f4").reshape(12, 5) + i for i in range(3)}
    return make(path, tensors, rows(2))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Consolidations:
    """Runs consolidations in processes of their own, which may die."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_consolidations, args=(theirs,), daemon=True)
        self._process.start()

    def run(self, *jobs: tuple[Path, int, bool, dict[str, Any]]) -> list[tuple[int, Any]]:
        """All of them at once; exit codes and what each of them says."""
        self._pipe.send([(str(f), call, after, {**OPTIONS, **o}) for f, call, after, o in jobs])
        assert self._pipe.poll(TIMEOUT), "a consolidation hangs"
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(TIMEOUT)


@pytest.fixture(scope="module")
def consolidations() -> Iterator[Consolidations]:
    server = Consolidations()
    yield server
    server.close()


def leftover(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".tmp-" in path.name]


def finished_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each file that the journal of a killed consolidation calls finished."""
    found = {}
    for place in leftover(folder):
        journal = place / "journal.jsonl"
        for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else ():
            if line.endswith(b"\n"):
                path = place / "model" / json.loads(line)["file"]
                if path.exists():
                    found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def kill_at(
    server: Consolidations, folder: Path, call: int, after: bool, wanted: dict[str, bytes]
) -> str:
    """One kill and what follows; what it met."""
    # The same save, whose manifest the exports name by its digest.
    shutil.copytree(folder.parent / "reference" / "c", folder / "c")
    ((code, said),) = server.run((folder, call, after, {}))
    assert code == -signal.SIGKILL, said
    if (folder / "out").exists():
        assert contents(folder / "out") == wanted, "what is there is whole"
        with pytest.raises(CheckpointExistsError):
            consolidate(folder / "c", folder / "out", **OPTIONS)
        assert not leftover(folder)
        return "published"
    kept = finished_files(folder)
    report = consolidate(folder / "c", folder / "out", **OPTIONS)
    assert report.ok and report.facts["taken_over"] == len(kept)
    assert contents(folder / "out") == wanted
    for name, state in kept.items():
        found = (folder / "out" / name).stat()
        assert (found.st_ino, found.st_mtime_ns) == state, f"{name} was written again"
    assert not leftover(folder)
    return f"{len(kept)} taken over"


def kills(server: Consolidations, folder: Path, number: int | None, seed: int) -> set[str]:
    """Kill at ``number`` moments drawn from all, or at all of them."""
    reference = folder / "reference"
    reference.mkdir()
    source(reference / "c")
    ((code, calls),) = server.run((reference, 0, False, {}))
    assert code == 0 and calls > 40
    wanted = contents(reference / "out")
    assert len(wanted) == 4, "three files and their index"
    moments = [(call, after) for call in range(1, calls + 1) for after in (False, True)]
    draw = random.Random(seed)
    if number is not None:
        moments = draw.sample(moments, number)
    met = set()
    for call, after in moments:
        here = folder / f"{call}-{after}"
        here.mkdir()
        met.add(kill_at(server, here, call, after, wanted))
    return met


@pytest.mark.slow
def test_kills(tmp_path: Path, consolidations: Consolidations) -> None:
    met = kills(consolidations, tmp_path, 60, seed=1)
    assert met >= {"0 taken over", "1 taken over", "2 taken over", "3 taken over"}


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_call(tmp_path: Path, consolidations: Consolidations) -> None:
    met = kills(consolidations, tmp_path, None, seed=1)
    assert met == {f"{n} taken over" for n in range(4)} | {"published"}


def stop_after_two(patch: pytest.MonkeyPatch) -> None:
    record = Workplace.record

    def stopping(place: Workplace, *line: Any) -> None:
        if len(place.finished) == 2:
            raise KeyboardInterrupt
        record(place, *line)

    patch.setattr(Workplace, "record", stopping)


def stopped_midway(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that is left when a user stops a consolidation with two files finished."""
    source(folder / "c")
    with monkeypatch.context() as patch:
        stop_after_two(patch)
        with pytest.raises(KeyboardInterrupt):
            consolidate(folder / "c", folder / "out", **OPTIONS)
    assert len(finished_files(folder)) == 2
    return leftover(folder)[0]


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16", "max_shard_size": 150}, {"rename": ["s/^w/v/"]}, {"format": "torch"}],
)
def test_other_arguments_take_nothing_over(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = stopped_midway(tmp_path, monkeypatch)
    report = consolidate(tmp_path / "c", tmp_path / "out", **{**OPTIONS, **options})
    assert report.facts["taken_over"] == 0
    assert not place.exists() and not leftover(tmp_path)


def test_a_save_again_under_the_same_name_takes_nothing_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_midway(tmp_path, monkeypatch)
    (tmp_path / "c").rename(tmp_path / "old")
    make(tmp_path / "c", {f"ema.w{i}": np.zeros((12, 5), "f4") for i in range(3)}, rows(2))
    assert consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS).facts["taken_over"] == 0
    assert not leftover(tmp_path)


@pytest.mark.parametrize(
    "fault", ["flipped", "truncated", "missing", "journal", "torn line", "other plan"]
)
def test_what_is_damaged_in_between_is_written_again(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = stopped_midway(tmp_path, monkeypatch)
    journal, file = place / "journal.jsonl", place / "model" / "model-00001-of-00003.safetensors"
    data = file.read_bytes()
    if fault == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "truncated":
        file.write_bytes(data[:-1])
    elif fault == "missing":
        file.unlink()
    elif fault == "journal":
        journal.write_bytes(b"\xff[]\n{}\n" + journal.read_bytes())
    elif fault == "torn line":
        journal.write_bytes(journal.read_bytes()[:-9])
    else:
        first, second = journal.read_text().splitlines()
        other = json.dumps(json.loads(first) | {"source": "0" * 32})
        journal.write_text(f"{other}\n{second}\n")
    (place / "model" / "stray").write_bytes(b"")
    report = consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS)
    assert report.facts["taken_over"] == (2 if fault == "journal" else 1)
    consolidate(tmp_path / "c", tmp_path / "again", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize("changed", [False, True])
def test_a_source_without_a_manifest_is_known_by_its_checksums(
    tmp_path: Path, changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a URL nothing else tells two saves of one size apart."""
    store = fsspec.filesystem("memory")

    def save(value: float) -> None:
        state = {f"model.w{i}": torch.full((12, 5), value + i) for i in range(3)}
        dcp.save(state, checkpoint_id=tmp_path / f"{value}", no_dist=True)
        store.put(str(tmp_path / f"{value}"), "/crash/c", recursive=True)

    def run() -> Any:
        return consolidate("memory://crash/c", tmp_path / "out", prefix="model", **OPTIONS)

    save(0.0)
    with monkeypatch.context() as patch:
        stop_after_two(patch)
        with pytest.raises(KeyboardInterrupt):
            run()
    if changed:
        store.rm("/crash", recursive=True)
        save(1.0)
    assert run().facts["taken_over"] == (0 if changed else 2)
    found = load_file(tmp_path / "out" / "model-00001-of-00003.safetensors")
    assert found["w0"][0, 0] == float(changed)
    store.rm("/crash", recursive=True)


@pytest.mark.parametrize("other", [{}, {"dtype": "bfloat16"}])
def test_two_at_once(tmp_path: Path, other: dict[str, Any], consolidations: Consolidations) -> None:
    """One of them wins and is whole; the other is told, and nothing is left of it."""
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        source(folder / "c")
        both = consolidations.run((folder, 0, False, {}), (folder, 0, False, other))
        words = [word for code, word in both if code == 0]
        lost = [word for word in words if isinstance(word, str)]
        assert len(words) == 2 and len(lost) == 1, words
        assert lost[0].startswith("CheckpointExistsError"), lost
        for name, options in (("same", {}), ("other", other)):
            consolidate(folder / "c", folder / name, **OPTIONS, **options)
        assert contents(folder / "out") in (contents(folder / "same"), contents(folder / "other"))
        assert not leftover(folder)


def test_of_a_dead_one_s_directory_only_one_gets_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have taken it over, or have removed it, at this very moment."""
    look, others = removal.look_at, []
    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "__exit__", lambda *_: None)
        with Workplace(tmp_path / "out", "0" * 32) as dead:
            pass
    dead._close()

    def late(path: Path, clock: Any) -> Any:
        found = look(path, clock)
        if not others:
            others.append(None)
            others.append(Workplace(tmp_path / "out", "0" * 32))
        return found

    monkeypatch.setattr(removal, "look_at", late)
    with pytest.raises(CheckpointExistsError, match="another process is consolidating"):
        Workplace(tmp_path / "out", "0" * 32)
    assert others[1]._hold.is_mine and len(leftover(tmp_path)) == 1


def test_who_comes_when_another_one_has_just_ended_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory that was in the way is gone by the time of the next look."""
    move, refused = Hold.move, []

    def late(self: Hold, place: Path) -> None:
        if not refused:
            refused.append(place)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(place))
        move(self, place)

    monkeypatch.setattr(Hold, "move", late)
    source(tmp_path / "c")
    assert consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS).ok
    assert refused and not leftover(tmp_path)


@pytest.mark.parametrize("kind", ["link inside", "link", "file", "owner"])
def test_a_planted_directory_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may read the checkpoint knows the name; see CWE-59."""
    place = stopped_midway(tmp_path, monkeypatch)
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    (home / "model" / "thesis").write_text("precious")
    if kind == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        os.chown(place, 4711, -1)
    elif kind == "link inside":
        (place / "model").rename(tmp_path / "away")
        (place / "model").symlink_to(home / "model")
    else:
        place.rename(tmp_path / "away")
        if kind == "link":
            place.symlink_to(home)
        else:
            place.write_text("precious")
    with pytest.raises(CheckpointWriteError, match="nothing was touched"):
        consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS)
    assert (home / "model" / "thesis").read_text() == "precious"
    assert kind != "file" or place.read_text() == "precious"


@pytest.mark.parametrize("silent", [False, True])
def test_one_on_another_machine_is_taken_over_once_it_is_silent(
    tmp_path: Path, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = stopped_midway(tmp_path, monkeypatch)
    (marker,) = place.glob("holder-*.json")
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"host": "elsewhere"}))
    if silent:
        for path in (*place.rglob("*"), place):
            os.utime(path, (1e9, 1e9))
        assert consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS).facts["taken_over"] == 2
        assert not leftover(tmp_path)
    else:
        with pytest.raises(CheckpointExistsError, match=r"process \d+ on elsewhere"):
            consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS)
        assert len(finished_files(tmp_path)) == 2


def test_what_goes_where_a_directory_was_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that takes the name of the directory while it is written to."""
    source(tmp_path / "c")
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    (home / "model" / "model-00003-of-00003.safetensors").write_text("precious")
    record = Workplace.record

    def exchanged(place: Workplace, *line: Any) -> None:
        if len(place.finished) == 1:
            (path,) = leftover(tmp_path)
            path.rename(tmp_path / "away")
            path.symlink_to(home)
        record(place, *line)

    monkeypatch.setattr(Workplace, "record", exchanged)
    with pytest.raises(CheckpointWriteError, match="was taken away"):
        consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS)
    assert contents(home / "model") == {"model-00003-of-00003.safetensors": b"precious"}


def test_what_is_finished_stays_if_the_disk_refuses_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path / "c")
    rename = os.rename

    def refuses(old: Path, new: Path, **options: Any) -> None:
        if Path(new).name == "model-00003-of-00003.safetensors":
            raise OSError(errno.EIO, "Input/output error", str(old))
        rename(old, new, **options)

    monkeypatch.setattr(os, "rename", refuses)
    with pytest.raises(CheckpointWriteError, match=r"Input/output error.*out\.tmp-") as told:
        consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS)
    assert "/proc/" not in str(told.value)
    monkeypatch.undo()
    assert consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS).facts["taken_over"] == 2


def test_what_the_journal_says_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut differs from a kill: what was not synced before may be gone."""
    source(tmp_path / "c")
    log: list[tuple[str, str]] = []
    rename, record = os.rename, Workplace.record

    def name_of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name

    def noted(sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            sync(descriptor)
            log.append(("synced", name_of(descriptor)))

        return call

    def noted_rename(old: Path, new: Path, **options: Any) -> None:
        log.append((f"renamed {Path(old).name}", Path(new).name))
        rename(old, new, **options)

    def noted_record(place: Workplace, file: str, *rest: Any) -> None:
        log.append(("recorded", file))
        record(place, file, *rest)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(Workplace, "record", noted_record)
    consolidate(tmp_path / "c", tmp_path / "out", **OPTIONS)
    for number in (1, 2, 3):
        file = f"model-0000{number}-of-00003.safetensors"
        ((renamed, old),) = [
            (i, said.split()[1])
            for i, (said, name) in enumerate(log)
            if name == file and " " in said
        ]
        assert old != file and ("synced", old) in log[:renamed]
        recorded = log.index(("recorded", file))
        assert ("synced", "model") in log[renamed:recorded]
        assert ("synced", "journal.jsonl") in log[recorded : recorded + 2]
    published = log.index(("renamed model", "out"))
    assert ("synced", "model.safetensors.index.json") in log[:published]
    assert log[published - 1] == ("synced", "model")
    assert log[published + 1] == ("synced", tmp_path.name)
