"""What lies beside a checkpoint: the pointer to the last, old ones, leftovers of killed saves."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from sharded_ema import ShardedEMA, consolidate, latest_checkpoint
from sharded_ema.checkpoint import durable, holding, removal
from sharded_ema.checkpoint import names as names_of
from sharded_ema.checkpoint.holding import Hold
from sharded_ema.checkpoint.run import committed
from sharded_ema.checkpoint.writing import target
from sharded_ema.checkpoint.writing.target import LocalTarget
from sharded_ema.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    ConfigError,
    EMAWarning,
)


@pytest.fixture
def ema() -> ShardedEMA:
    return ShardedEMA(torch.nn.Linear(3, 2), 0.9)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_last_ones_are_kept(ema: ShardedEMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "best", step=0)
    (tmp_path / "step_notes").mkdir()
    for step in range(5):
        ema.save(tmp_path / f"step_{step}", step=step, keep_last=2)
    assert names(tmp_path) == {"best", "step_notes", "step_3", "step_4", "latest"}
    ema.save(tmp_path / "step_5", step=5, keep_last=1, asynchronous=True).result()
    assert names(tmp_path) == {"best", "step_notes", "step_5", "latest"}
    for wrong in (0, -1, 1.0, True):
        with pytest.raises(ConfigError, match="keep_last"):
            ema.save(tmp_path / "step_6", step=6, keep_last=wrong)  # type: ignore[arg-type]


def test_after_going_back_the_new_ones_count(ema: ShardedEMA, tmp_path: Path) -> None:
    for step in (100, 200, 300):
        ema.save(tmp_path / f"step_{step}", step=step)
    ema.load(tmp_path / "step_100")
    ema.save(tmp_path / "step_150", step=150, keep_last=2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_150"
    assert names(tmp_path) == {"step_300", "step_150", "latest"}


def test_latest_is_followed(ema: ShardedEMA, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        latest_checkpoint(tmp_path / "nowhere")
    ema.save(tmp_path / "a", step=1)
    ema.save(tmp_path / "b", step=2)
    ema.save(tmp_path / "quiet", step=3, latest=False)
    assert (tmp_path / "latest").read_text() == "b\n"
    assert ema.load(tmp_path / "latest") == 2
    assert consolidate(tmp_path / "latest", tmp_path / "out", progress=False).ok
    assert latest_checkpoint(tmp_path) == tmp_path / "quiet"
    with pytest.raises(CheckpointNotFoundError, match="3 directories in it do, such as quiet"):
        ema.load(tmp_path)
    for wrong in ("../b", "", "/etc", "b\0"):
        (tmp_path / "latest").write_text(wrong)
        with pytest.raises(CheckpointNotFoundError):
            ema.load(tmp_path / "latest")


def test_what_others_call_latest_stays(ema: ShardedEMA, tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "latest").write_text("global_step3")  # as DeepSpeed writes it
    ema.save(tmp_path / "a", step=1)
    assert (tmp_path / "latest").read_text() == "global_step3"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "latest").symlink_to("elsewhere")
    ema.save(tmp_path / "linked" / "a", step=1)
    assert (tmp_path / "linked" / "latest").readlink() == Path("elsewhere")


def test_trouble_beside_a_commit_is_a_warning(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(target: LocalTarget, data: bytes) -> None:
        raise OSError("no room for a name")

    monkeypatch.setattr(LocalTarget, "_point", fails)
    with pytest.warns(EMAWarning, match="is committed, but .* no room for a name"):
        ema.save(tmp_path / "a", step=1)
    assert ema.load(tmp_path / "a", verify=True) == 1


def test_a_damaged_checkpoint_is_neither_last_nor_removed(ema: ShardedEMA, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        ema.save(tmp_path / f"step_{step}", step=step)
    manifest = tmp_path / "step_3" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    assert latest_checkpoint(tmp_path) == tmp_path / "step_2"
    ema.save(tmp_path / "step_4", step=4, keep_last=1)
    assert names(tmp_path) == {"step_3", "step_4", "latest"}


def test_time_of_commit_is_recorded_and_optional(ema: ShardedEMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "a", step=1)
    (only,) = committed(tmp_path)
    stored = json.loads((tmp_path / "a" / "manifest.json").read_bytes())["saved_at"]
    assert only.saved_at == stored > 1_700_000_000_000


# ---------------------------------------------------------------------- leftovers


def far_away(hold: Hold) -> None:
    """Let a directory that is held here be that of a process on another machine."""
    marker = hold.place / f"holder-{hold.uuid}.json"
    said = json.loads(marker.read_bytes()) | {"host": "elsewhere"}
    marker.write_text(json.dumps(said))


def silent_for(path: Path, seconds: float) -> None:
    """Let nothing in a directory have changed for so long."""
    for each in (*path.rglob("*"), path):
        then = each.stat().st_mtime - seconds
        os.utime(each, (then, then))


def begun(path: Path, *files: str) -> Hold:
    """A save that has begun in this process, and is under way while somebody has the result."""
    hold = Hold.make(names_of.temporary(path))
    for file in files:
        (hold.place / "checkpoint").mkdir(exist_ok=True)
        (hold.place / "checkpoint" / file).write_bytes(b"x")
    return hold


def test_what_dead_saves_have_left_goes_at_the_next_one(ema: ShardedEMA, tmp_path: Path) -> None:
    begun(tmp_path / "step_1", "shard-00000.safetensors", "shard-00001.safetensors")
    begun(tmp_path / "step_2", "__0_0.distcp", ".metadata.tmp")
    begun(tmp_path / "latest")
    names_of.temporary(tmp_path / "step_3").mkdir()  # killed before it was held
    names_of.temporary(tmp_path / "clock").write_bytes(b"")  # or while it asked for the time
    half = names_of.temporary(tmp_path / "step_4")
    half.mkdir()
    (half / f"holder-{half.name[-32:]}.new").write_bytes(b"{")
    dead = names_of.doomed(tmp_path / "step_5")  # or while it removed something
    dead.mkdir()
    (dead / "shard-00001.safetensors").write_bytes(b"x")
    ema.save(tmp_path / "a", step=1)
    assert names(tmp_path) == {"a", "latest"}


def test_what_was_set_aside_is_recovered_or_goes(ema: ShardedEMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "a", step=1)
    shutil.copytree(tmp_path / "a", names_of.set_aside(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", names_of.set_aside(tmp_path / "lost"))
    # As earlier versions call them.
    shutil.copytree(tmp_path / "a", tmp_path / f"a.old-{uuid4().hex}")
    shutil.copytree(tmp_path / "a", tmp_path / f"lost too.old-{uuid4().hex}")
    mine = tmp_path / f"a.old-{uuid4().hex}"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    ema.save(tmp_path / "b", step=2)
    assert names(tmp_path) == {"a", "b", "lost", "lost too", "latest", mine.name}
    assert ema.load(tmp_path / "lost") == 1


def test_what_is_being_replaced_elsewhere_is_left_alone(ema: ShardedEMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "a", step=1)
    other = begun(tmp_path / "a", "shard-00000.safetensors")
    far_away(other)
    aside = removal.put_aside(tmp_path / "a", other.uuid)
    ema.save(tmp_path / "b", step=2)
    assert aside.exists() and not (tmp_path / "a").exists()
    assert ema.load(tmp_path / "a") == 1, "readers find it"
    other.close()
    silent_for(other.place, 3600)
    ema.save(tmp_path / "c", step=3)
    assert names(tmp_path) == {"a", "b", "c", "latest"}


def test_what_another_save_is_writing_is_not_a_leftover(ema: ShardedEMA, tmp_path: Path) -> None:
    here, there = (begun(tmp_path / f"step_{n}", "shard-00000.safetensors") for n in (1, 2))
    pointer = begun(tmp_path / "latest", "shard-00000.safetensors")
    far_away(there)
    ema.save(tmp_path / "step_3", step=3)
    assert all(hold.is_mine or hold is there for hold in (here, there, pointer))
    assert there.place.exists()
    here.close()
    pointer.close()
    ema.save(tmp_path / "step_4", step=4)
    assert not here.place.exists() and not pointer.place.exists() and there.place.exists()


@pytest.mark.parametrize("seconds", [0, 200, 1000])
@pytest.mark.parametrize("ahead", [-86400.0, 86400.0])
def test_heartbeats_go_by_the_clock_of_the_file_system(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, ahead: float
) -> None:
    """Whatever this machine takes for the time."""
    there = begun(tmp_path / "step_1", "shard-00000.safetensors")
    far_away(there)
    silent_for(there.place, seconds)
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + ahead)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(ahead * 1e9))
    ema.save(tmp_path / "step_2", step=2)
    assert there.place.exists() == (seconds < holding.DEAD_AFTER_SECONDS)


def test_a_process_that_has_ended_holds_nothing(ema: ShardedEMA, tmp_path: Path) -> None:
    """Also if another one has its number."""
    child = os.fork()
    if not child:
        begun(tmp_path / "step_1", "shard-00000.safetensors")
        os._exit(0)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert ".tmp-" in left.name
    reused = begun(tmp_path / "step_2", "shard-00000.safetensors")
    marker = reused.place / f"holder-{reused.uuid}.json"
    marker.write_text(json.dumps(json.loads(marker.read_bytes()) | {"pid": 1}))
    ema.save(tmp_path / "step_3", step=3)
    assert names(tmp_path) == {"step_3", "latest"}


def strange(path: Path, kind: str) -> Path:
    """A directory like a leftover, of which something is not."""
    if kind == "digits":
        place = path.with_name(f"{path.name}.tmp-{uuid4().hex}")
        place.mkdir()
        (place / "shard-00000.safetensors").write_bytes(b"of another program")
        return place
    place = begun(path, "shard-00000.safetensors").place
    if kind == "file":
        (place / "checkpoint" / "letter.txt").write_text("dear")
    elif kind == "link":
        (place / "checkpoint" / "shard-00001.safetensors").symlink_to(place)
    elif kind == "linked directory":
        place.rename(path.with_name("precious"))
        place.symlink_to("precious")
    elif kind == "owner":
        os.chown(place, 4711, -1)
    return place


KINDS = ["digits", "file", "link", "linked directory"]
KINDS += ["owner"] * (os.geteuid() == 0)  # only root can give a directory away


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_proven_to_be_a_leftover_stays(
    ema: ShardedEMA, tmp_path: Path, kind: str
) -> None:
    place = strange(tmp_path / "step_1", kind)
    silent_for(place, 86400)
    ema.save(tmp_path / "a", step=1)
    assert os.path.lexists(place) and list(place.rglob("shard-00000.safetensors"))


def test_leftovers_of_earlier_versions_go_once_they_are_old(
    ema: ShardedEMA, tmp_path: Path
) -> None:
    """They are known by the uuid in their files."""
    ema.save(tmp_path / "a", step=1)
    uuid = json.loads((tmp_path / "a" / "manifest.json").read_bytes())["uuid"]
    place = tmp_path / f"b.tmp-{uuid}"
    shutil.copytree(tmp_path / "a", place)
    (place / "manifest.json").unlink()
    ema.save(tmp_path / "c", step=2)
    assert place.exists()
    silent_for(place, 3600)
    ema.save(tmp_path / "d", step=3)
    assert not place.exists()


def test_a_directory_that_is_removed_before_it_is_held_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, times = Path.mkdir, []

    def robbed(path: Path, *args: Any, **options: Any) -> None:
        mkdir(path, *args, **options)
        if len(times) < 3:
            times.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", robbed)
    hold = Hold.make(names_of.temporary(tmp_path / "a"))
    assert hold.is_mine and len(times) == 3


def test_a_directory_whose_marker_is_removed_before_it_counts_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, which has not removed the directory itself yet."""
    rename, place = os.rename, names_of.temporary(tmp_path / "a")
    times = []

    def robbed(source: Any, *args: Any, **options: Any) -> None:
        if len(times) < 3:
            times.append(source)
            (place / source).unlink()
        rename(source, *args, **options)

    monkeypatch.setattr(os, "rename", robbed)
    hold = Hold.make(place)
    assert hold.is_mine and len(times) == 3


@pytest.mark.parametrize("begun", [False, True])
def test_a_directory_that_is_held_since_the_look_at_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Another process has seen it bare, and comes to remove it when its maker has gone on."""
    place, look, holds = names_of.temporary(tmp_path / "step_1"), removal.look_at, []
    place.mkdir()
    if begun:  # by a process that was killed then
        (place / f"holder-{names_of.new_uuid()}.new").touch()

    def late(path: Path, clock: Any) -> Any:
        found = look(path, clock)
        hold = Hold(place)
        hold._enter()
        hold._mark()
        holds.append(hold)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(removal, "look_at", late)
        removal.remove_leftovers(tmp_path)
    (hold,) = holds
    assert hold.is_mine and [p.name for p in tmp_path.iterdir()] == [place.name]
    hold.close()
    other = names_of.temporary(tmp_path / "step_2")
    other.mkdir()
    if begun:
        (other / f"holder-{names_of.new_uuid()}.new").touch()
    removal.remove_leftovers(tmp_path)
    assert not other.exists()


def test_a_save_whose_directory_was_removed_cannot_commit(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = target.publish

    def robbed(hold: Hold, *args: Any, **options: Any) -> None:
        removal.remove(hold.place)
        publish(hold, *args, **options)

    monkeypatch.setattr(target, "publish", robbed)
    with pytest.raises(CheckpointWriteError, match="was taken away from this process"):
        ema.save(tmp_path / "a", step=1)
    assert not (tmp_path / "a").exists()


def test_trouble_after_the_commit_is_no_failed_save(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema.save(tmp_path / "a", step=1)

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, "fsync", fails)
    monkeypatch.setattr(removal, "_erase", lambda _: "no room for a name")
    with pytest.warns(EMAWarning) as told:
        ema.save(tmp_path / "a", step=2, replace=True, latest=False)
    said = [str(warning.message) for warning in told]
    assert "could not be flushed" in said[0] and "what it has replaced is left" in said[1]
    monkeypatch.undo()
    assert ema.load(tmp_path / "a", verify=True) == 2


def test_a_replacement_that_fails_puts_the_old_one_back(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema.save(tmp_path / "last", step=1)
    rename = os.rename

    def refuses(source: Path, target: Path, **options: Any) -> None:
        if Path(target) == tmp_path / "last" and source == "checkpoint":
            raise OSError("not today")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refuses)
    with pytest.raises(CheckpointWriteError, match="not today"):
        ema.save(tmp_path / "last", step=2, replace=True)
    monkeypatch.undo()
    assert names(tmp_path) == {"last", "latest"}
    assert ema.load(tmp_path / "last") == 1
    with pytest.raises(CheckpointExistsError):
        ema.save(tmp_path / "last", step=2)


@pytest.mark.parametrize("name", ["x.tmp-1", "exp.tmp-2024-01", f"x.old-{'0' * 32}"])
def test_names_that_nobody_would_read_are_refused(
    ema: ShardedEMA, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="choose one without"):
        ema.save(tmp_path / name, step=1)
    assert not names(tmp_path)


# ---------------------------------------------------------------------- whose is the last one


def test_a_clock_that_goes_back_changes_no_order(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = [86_400_000_000_000]
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + ahead[0])
    for step in range(1, 8):
        ema.save(tmp_path / f"step_{step}", step=step, keep_last=3)
        ahead[0] -= 7_200_000_000_000
        times = [c.saved_at for c in committed(tmp_path)]
        assert times == sorted(set(times)), "later than all beside it"
        assert latest_checkpoint(tmp_path) == tmp_path / f"step_{step}"
    assert names(tmp_path) == {"step_5", "step_6", "step_7", "latest"}


@pytest.mark.parametrize(
    "patterns",
    [
        ("ema_0.999_step_{}", "ema_0.9999_step_{}"),
        ("seed0_step_{}", "seed1_step_{}"),
        ("step_{}_of_400_a1", "step_{}_of_400_a2"),
    ],
)
@pytest.mark.parametrize("alike", [False, True])
def test_each_average_keeps_its_own(tmp_path: Path, patterns: tuple[str, str], alike: bool) -> None:
    """Two averages, or one that is saved under two names."""
    first = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    averages = (first, first if alike else ShardedEMA(torch.nn.Linear(3, 2), 0.9))
    for step in (100, 200, 300):
        for ema, pattern in zip(averages, patterns, strict=True):
            ema.save(tmp_path / pattern.format(step), step=step, keep_last=2)
    wanted = {pattern.format(step) for pattern in patterns for step in (200, 300)}
    assert names(tmp_path) == wanted | {"latest"}


def test_an_average_is_the_same_after_a_load(ema: ShardedEMA, tmp_path: Path) -> None:
    for step in (1, 2):
        ema.save(tmp_path / f"step_{step}", step=step)
    other = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    other.save(tmp_path / "step_3", step=3, keep_last=1)
    assert names(tmp_path) == {"step_1", "step_2", "step_3", "latest"}, "which is another one"
    resumed = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    resumed.load(tmp_path / "step_2")
    resumed.save(tmp_path / "step_4", step=4, keep_last=2)
    assert names(tmp_path) == {"step_2", "step_3", "step_4", "latest"}
    through_state = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    through_state.load_state_dict(resumed.state_dict())
    through_state.save(tmp_path / "step_5", step=5, keep_last=1)
    assert names(tmp_path) == {"step_3", "step_5", "latest"}
    copy.deepcopy(through_state).save(tmp_path / "step_6", step=6, keep_last=1)
    assert names(tmp_path) == {"step_3", "step_5", "step_6", "latest"}


def test_what_latest_names_stays(
    ema: ShardedEMA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sharded_ema")
    for step in (1, 2):
        ema.save(tmp_path / f"step_{step}", step=step)
    (tmp_path / "latest").write_text("step_1\n")
    ema.save(tmp_path / "step_3", step=3, keep_last=1, latest=False)
    assert names(tmp_path) == {"step_1", "step_3", "latest"}
    said = [r.getMessage() for r in caplog.records if r.name == "sharded_ema"]
    assert said == [f"keep_last=1 removed {tmp_path / 'step_2'} (step 2)"]


def test_what_cannot_be_removed_is_said(
    ema: ShardedEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema.save(tmp_path / "step_1", step=1)
    monkeypatch.setattr(removal, "_erase", lambda _: "shard-00000 cannot be removed: not today")
    with pytest.warns(EMAWarning, match=r"keep_last=1 leaves something of .*step_1.*not today"):
        ema.save(tmp_path / "step_2", step=2, keep_last=1)
