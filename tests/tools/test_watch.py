"""``watch``: exports of a run that goes on, replaces, removes and damages its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sharded_ema import watch
from sharded_ema.checkpoint import removal
from sharded_ema.checkpoint.holding import Hold
from sharded_ema.checkpoint.names import temporary
from sharded_ema.checkpoint.reading import manifest
from sharded_ema.checkpoint.reading.manifest import dump_manifest, parse_manifest
from sharded_ema.cli import main
from sharded_ema.errors import CheckpointExistsError, CheckpointNotFoundError, ConfigError
from sharded_ema.tools import watch as module
from sharded_ema.tools import workplace
from sharded_ema.tools.report import Report
from sharded_ema.tools.watch import _alone
from tests.helpers.checkpoints import flip, make, meta, rows


@pytest.fixture(autouse=True)
def interruptible() -> None:
    """Ctrl-C does something, which a shell that starts a job with & has switched off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def save(path: Path, step: int, value: float | None = None) -> str:
    """Commit a checkpoint whose weights tell its step; returns its uuid."""
    uuid = uuid4().hex
    weights = np.full((5, 3), step if value is None else value, "f4")
    make(path, {"ema.w": weights}, rows(2), metas={"": meta(step=step)}, uuid=uuid)
    return uuid


def shown(out: Path) -> dict[str, float]:
    """What each entry of the exports holds, ``latest`` included."""
    return {
        path.name: float(load_file(path / "model.safetensors")["w"][0, 0])
        for path in sorted(out.iterdir())
        if not path.name.startswith(".watch.")  # who is at work here
    }


def once(run: Path, out: Path, **settings: object) -> list[Report]:
    return list(watch(run, out, once=True, **settings))  # type: ignore[arg-type]


class Script:
    """Waits as a program of actions: one at each wait, and the end after the last."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self._actions = list(actions)
        self.timeouts: list[float] = []

    def is_set(self) -> bool:
        return False

    def wait(self, timeout: float) -> bool:
        self.timeouts.append(timeout)
        if not self._actions:
            return True
        self._actions.pop(0)()
        return False


def test_what_there_is(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    uuids = [save(run / f"step_{step}", step) for step in (1, 2, 3)]
    reports = once(run, out)
    assert [r.facts["output"] for r in reports] == [str(out / "step_2"), str(out / "step_3")]
    assert shown(out) == {"step_2": 2, "step_3": 3, "latest": 3}
    assert (out / "latest").readlink() == Path("step_3")
    with safe_open(out / "latest" / "model.safetensors", "np") as file:
        assert file.metadata()["source"] == uuids[2]
    assert not once(run, out)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """It does not exist yet when the watch begins."""
    run, out = tmp_path / "run", tmp_path / "out"
    seen: list[dict[str, float]] = []

    def then(*steps: int) -> Callable[[], None]:
        def act() -> None:
            seen.append(shown(out))
            for step in steps:
                save(run / f"step_{step}", step)

        return act

    script = Script(then(1), then(2), then(3, 4, 5), then())
    reports = list(watch(run, out, stop=script, interval=7))
    assert [r.facts["step"] for r in reports] == [1, 2, 4, 5]
    assert seen == [
        {},
        {"step_1": 1, "latest": 1},
        {"step_1": 1, "step_2": 2, "latest": 2},
        {"step_4": 4, "step_5": 5, "latest": 5},
    ]
    assert set(script.timeouts) == {7}


def test_what_has_not_changed_is_not_parsed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (1, 2, 3):
        save(run / f"step_{step}", step)
    parsed: list[str] = []

    def counting(parse: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object) -> object:
            parsed.append(str(args[-1]))
            return parse(*args)

        return counted

    monkeypatch.setattr(manifest, "parse_manifest", counting(manifest.parse_manifest))
    monkeypatch.setattr(module, "read_header", counting(module.read_header))
    seen: list[list[str]] = []

    def look() -> None:
        seen.append(sorted(parsed))
        parsed.clear()

    def replace() -> None:
        look()
        shutil.rmtree(run / "step_2")
        save(run / "step_2", 2, 7)

    def touch() -> None:  # as a copy would, that has the same size
        look()
        content = (run / "step_1" / "manifest.json").read_bytes()
        (run / "step_1" / "manifest.json").write_bytes(content)

    list(watch(run, out, stop=Script(look, look, replace, look, touch, look)))
    assert len(seen[0]) >= 3 and not seen[1] and not seen[2]
    assert seen[3] and all("step_2" in path for path in seen[3])
    assert not seen[4] and seen[5] == [str(run / "step_1" / "manifest.json")]
    assert shown(out) == {"step_2~1": 7, "step_3": 3, "latest": 3}


def test_steps_fall_when_a_run_goes_back(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (100, 200):
        save(run / f"step_{step}", step)
    set_saved_at(run / "step_100", 2000)
    set_saved_at(run / "step_200", 1000)
    once(run, out, keep=1)
    assert shown(out) == {"step_100": 100, "latest": 100}


def set_saved_at(path: Path, saved_at: int) -> None:
    file = path / "manifest.json"
    manifest = parse_manifest(file.read_bytes(), "")
    file.write_bytes(dump_manifest(replace(manifest, saved_at=saved_at)))


@pytest.mark.parametrize(
    "layout", ["checkpoints/step_{}/ema", "step_{}/ema", "checkpoints/step_{}"]
)
def test_averages_in_the_directories_of_steps(tmp_path: Path, layout: str) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (1, 2):
        path = run / layout.format(step)
        save(path, step)
        if path.name == "ema":
            (path.parent / "train").mkdir()
            (path.parent / "trainer.json").write_text("{}")
    (run / "ema").symlink_to(run / layout.format(2))  # as the training program has it
    once(run, out)
    assert shown(out) == {"step_1": 1, "step_2": 2, "latest": 2}


def test_half_written_ones_are_not_touched(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    save(run / f"step_2.tmp-{uuid4().hex}", 2)
    save(run / f"step_1.old-{uuid4().hex}", 0)
    save(run / "step_3", 3)
    (run / "step_3" / "manifest.json").unlink()
    assert [r.ok for r in once(run, out)] == [True]
    assert shown(out) == {"step_1": 1, "latest": 1}


def test_a_replaced_one_is_exported_anew(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_0", 0)
    save(run / "step_1", 1)
    once(run, out)
    shutil.rmtree(run / "step_1")
    save(run / "step_1", 1, value=10)
    once(run, out)
    assert shown(out) == {"step_0": 0, "step_1~1": 10, "latest": 10}
    shutil.rmtree(run / "step_1")
    save(run / "step_1", 1, value=20)
    once(run, out)
    assert shown(out) == {"step_0": 0, "step_1": 20, "latest": 20}


def test_other_settings_are_exported_anew(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    once(run, out)
    assert len(once(run, out, dtype="float16")) == 1 and not once(run, out, dtype="float16")
    assert load_file(out / "latest" / "model.safetensors")["w"].dtype == np.float16
    assert len(list(out.iterdir())) == 2


def test_retention_leaves_the_exports(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"

    def exchange(old: int, new: int) -> Callable[[], None]:
        def act() -> None:
            removal.remove(run / f"step_{old}")
            save(run / f"step_{new}", new)

        return act

    save(run / "step_9", 9)
    script = Script(exchange(9, 10), exchange(10, 11))
    assert all(report.ok for report in watch(run, out, stop=script))
    assert shown(out) == {"step_10": 10, "step_11": 11, "latest": 11}


def test_one_that_vanishes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (1, 2, 3):
        save(run / f"step_{step}", step)

    def late(src: Path, *args: object, **settings: object) -> Report:
        if src.name == "step_2":
            removal.remove(src)
        return consolidate(src, *args, **settings)  # type: ignore[arg-type]

    consolidate = module.consolidate
    monkeypatch.setattr(module, "consolidate", late)
    reports = once(run, out)
    assert all(report.ok for report in reports)
    assert "removed or replaced" in reports[0].text() and "output" not in reports[0].facts
    assert shown(out) == {"step_1": 1, "step_3": 3, "latest": 3}


def test_damage_is_reported_once_and_passed_over(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for step in (1, 2, 3, 4):
        save(run / f"step_{step}", step)
    flip(run / "step_3" / "shard-00000.safetensors", 4100)
    flip(run / "step_4" / "manifest.json", 40)

    def mend() -> None:
        shutil.rmtree(run / "step_3")
        save(run / "step_3", 3)

    reports = list(watch(run, out, stop=Script(lambda: None, mend), keep=2))
    failed = [report for report in reports if not report.ok]
    assert len(failed) == 2 and "step_4" in failed[0].text() and "ema.w" in failed[1].text()
    assert [r.facts["step"] for r in reports if r.ok] == [2, 1, 3]
    assert shown(out) == {"step_2": 2, "step_3": 3, "latest": 3}
    assert main(["watch", str(run), "--out", str(out), "--once"]) == 1
    removal.remove(run / "step_4")
    assert main(["watch", str(run), "--out", str(out), "--once"]) == 0


def test_a_full_disk_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    full = shutil._ntuple_diskusage(1, 1, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    reports = list(watch(run, out, stop=Script(lambda: None, monkeypatch.undo)))
    assert [report.ok for report in reports] == [False, False, True]
    assert shown(out) == {"step_1": 1, "latest": 1}


def test_what_a_killed_watch_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there for the export that goes on with it, and gone when the watch waits."""
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    once(run, out)
    (out / "latest").unlink()  # killed between the export and the link
    temporary(out / "latest").symlink_to("step_1")
    hold = Hold.make(temporary(out / "step_2"))
    half = hold.place
    (half / "model").mkdir()
    (half / "model" / "model.safetensors").write_bytes(b"half")
    hold.close()  # as by its death
    (out / "notes").mkdir()
    save(run / "step_2", 2)

    def looking(*args: object, **settings: object) -> Report:
        assert half.is_dir()
        return consolidate(*args, **settings)  # type: ignore[arg-type]

    consolidate = module.consolidate
    monkeypatch.setattr(module, "consolidate", looking)
    seen: list[set[str]] = []
    script = Script(lambda: seen.append({p.name for p in out.iterdir() if "watch" not in p.name}))
    assert len(list(watch(run, out, stop=script))) == 1
    assert seen == [{"step_1", "step_2", "latest", "notes"}]


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    once(run, out)
    save(run / "step_2", 2)

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(workplace, "publish", interrupted)
    command = ["watch", str(run), "--out", str(out)]
    handler = signal.getsignal(signal.SIGTERM)
    assert main(command) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert shown(out) == {"step_1": 1, "latest": 1}
    assert main([*command, "--once"]) == 0
    assert shown(out) == {"step_1": 1, "step_2": 2, "latest": 2}


def test_an_interrupted_removal_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    once(run, out)
    save(run / "step_2", 2)

    def interrupted(path: Path, **settings: bool) -> None:
        if "step_1" in path.name:
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGINT)
        rmtree(path, **settings)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    assert main(["watch", str(run), "--out", str(out), "--keep", "1"]) == 0
    assert shown(out) == {"step_2": 2, "latest": 2}


def test_wrong_use(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    for wrong in ({"keep": 0}, {"keep": True}, {"interval": 0}, {"dtype": "int8"}):
        with pytest.raises(ConfigError):
            watch(run, out, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is a checkpoint"):
        watch(run / "step_1", out)
    with pytest.raises(CheckpointNotFoundError, match="no run"):
        watch(run / "step_1" / "manifest.json", out)
    (tmp_path / "empty").mkdir()
    (report,) = once(tmp_path / "empty", out)
    assert report.ok and "no committed checkpoint" in report.text()
    shutil.rmtree(out)
    for place in (run, run / "step_1" / "out"):
        with pytest.raises(ConfigError):
            once(run, place)
    with pytest.raises(CheckpointNotFoundError, match="no run"):
        watch(tmp_path / "nothing", out, once=True)
    with pytest.raises(CheckpointNotFoundError, match="no model directory"):
        watch(run, out, like=tmp_path / "nothing")
    out.mkdir()
    (out / "latest").write_text("step_1\n")
    with pytest.raises(CheckpointExistsError, match="symbolic link"):
        watch(run, out)
    assert main(["watch", str(run), "--out", str(out), "--once"]) == 2
    with _alone(run), pytest.raises(ConfigError, match="another watch"):
        once(tmp_path / "empty", run)


def test_like_a_model(tmp_path: Path) -> None:
    run, out, like = tmp_path / "run", tmp_path / "out", tmp_path / "like"
    save(run / "step_1", 1)
    like.mkdir()
    (like / "config.json").write_text("{}")
    save_file({"w": np.zeros((5, 3), "f4")}, like / "model.safetensors")
    once(run, out, like=like)
    assert (out / "latest" / "config.json").is_file()
    save_file({"v": np.zeros((5, 3), "f4")}, like / "model.safetensors")
    save(run / "step_2", 2)
    (report,) = once(run, out, like=like)
    assert not report.ok and "are not in the checkpoint" in report.text()
    assert shown(out) == {"step_1": 1, "latest": 1}


def test_other_files_of_the_model_are_exported_anew(tmp_path: Path) -> None:
    run, out, like = tmp_path / "run", tmp_path / "out", tmp_path / "like"
    save(run / "step_1", 1)
    once(run, out)
    like.mkdir()
    (like / "config.json").write_text("{}")
    assert [Path(r.facts["output"]).name for r in once(run, out, like=like)] == ["step_1~1"]
    (out / "step_1~1" / "scores.json").write_text("{}")  # of whoever reads the exports
    assert once(run, out, like=like) == [] == once(run, out)
    (like / "config.json").write_text('{"a": 1}')
    assert [Path(r.facts["output"]).name for r in once(run, out, like=like)] == ["step_1"]
    assert (out / "latest" / "config.json").read_text() == '{"a": 1}'
    assert set(shown(out)) == {"step_1", "latest"}


def test_one_that_is_still_being_copied(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    shard = run / "step_1" / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    reports = list(watch(run, out, stop=Script(lambda: None, lambda: shard.write_bytes(whole))))
    assert [report.ok for report in reports] == [False, True]
    assert shown(out) == {"step_1": 1, "latest": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_when_told(tmp_path: Path, number: signal.Signals) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    command = [sys.executable, "-m", "sharded_ema", "watch", str(run), "--out", str(out)]
    flags = ["--dtype", "bfloat16", "--interval", "0.05", "--json"]
    process = subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for step in (1, 2):
        if step == 2:  # it waits by now, or soon
            save(tmp_path / "step_2", 2)
            os.rename(tmp_path / "step_2", run / "step_2")
        assert json.loads(process.stdout.readline())["facts"]["step"] == step
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert {path.name for path in out.iterdir()} == {"step_1", "step_2", "latest"}


def test_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save(run / "step_1", 1)
    save(run / "step_2", 2)
    flip(run / "step_2" / "shard-00001.safetensors", 4100)
    assert main(["watch", str(run), "--out", str(out), "--once", "--keep", "1"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{run / 'step_2'}: FAILED: ") and "damaged" in first
    assert second.startswith(f"{run / 'step_1'}: exported to {out / 'step_1'} (step 1, 60 B in")
