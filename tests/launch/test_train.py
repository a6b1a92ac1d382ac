"""The training program as its users start it: real runs of a tiny model, in processes of their own.

Starting torchrun costs more than training here, so the runs are fixtures that tests share.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shlex
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sharded_ema.averaging.schedules import parse_schedule
from tests.launch.programs import (
    AVERAGE,
    Check,
    TrainingRun,
    assert_same,
    average_of,
    check_export,
    consolidate,
    finished,
    sweep,
    train,
    weights_of,
)

pytestmark = pytest.mark.dist

PROFILES = {"fast": "0.5", "slow": "half_life:4", "wide": "power:0.1"}


# ---------------------------------------------------------------------- the runs that tests share


@pytest.fixture(scope="module")
def base(folder: Path, corpus: Path) -> TrainingRun:
    """FSDP2 on two ranks, uninterrupted: what all others are compared with."""
    return finished(folder, "base", corpus, 2, *AVERAGE)


@pytest.fixture(scope="module")
def export(base: TrainingRun) -> Path:
    return consolidate(base)


@pytest.fixture(scope="module")
def again(folder: Path, corpus: Path) -> TrainingRun:
    """The same flags once more; and there is nothing to resume."""
    return finished(folder, "again", corpus, 2, *AVERAGE, "--resume", "auto")


@pytest.fixture(scope="module")
def several(folder: Path, corpus: Path) -> TrainingRun:
    """Several averages that begin late and move at every second step; tokens of several bytes."""
    flags = ["--ema", "--ema-start-step", "4", "--ema-update-every", "2"]
    for name, text in PROFILES.items():
        flags += ["--ema-profile", f"{name}={text}"]
    flags += ["--seed", "1", "--steps", "8"]
    return finished(folder, "several", corpus, 2, *flags, "--vocab-size", "300", "--workers", "1")


# ---------------------------------------------------------------------- from training to export


def test_run_writes_losses_of_weights_and_average(base: TrainingRun) -> None:
    rows = base.rows()
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(row["train_loss"]) for row in rows.values())
    evaluated = [step for step, row in rows.items() if "raw_loss" in row]
    assert evaluated == [3, 6]
    for step in evaluated:
        # The average is another model than the weights, and evaluating it has not changed them.
        assert rows[step]["raw_loss"] != rows[step]["ema_loss/ema"]
        assert rows[step]["ema/num_updates"] == step
    assert rows[6]["train_loss"] < rows[1]["train_loss"]

    with (base.out / "metrics.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    names = {"step", "train_loss", "raw_loss", "ema_loss/ema", "lr", "tokens_per_second"}
    assert names | {"peak_memory"} <= table[0].keys()
    assert 2**20 < rows[6]["peak_memory"] < 2**40
    for line in table:
        row = rows[int(line["step"])]
        assert {name: float(text) for name, text in line.items() if text} == row


def test_run_leaves_picture_summary_and_board(base: TrainingRun) -> None:
    picture = (base.out / "loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[12:16] == b"IHDR"
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 600 and height >= 400 and len(picture) > 10_000

    summary = json.loads((base.out / "summary.json").read_text())
    last = base.rows()[6]
    assert summary["step"] == 6
    assert summary["raw_loss"] == last["raw_loss"]
    assert summary["ema_loss"] == {"ema": last["ema_loss/ema"]}
    assert (base.out / summary["ema_checkpoint"]).resolve() == base.checkpoint(6) / "ema"

    (events,) = (base.out / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.") and events.stat().st_size > 1000
    assert (base.out / "hf" / "config.json").is_file()
    assert (base.out / "checkpoints" / "latest").read_text().strip() == "step_000006"


def test_export_loses_what_training_said(base: TrainingRun, export: Path) -> None:
    done = check_export(export, base).good()
    assert done.out.count("they agree") == 2
    assert "text       most likely 24 tokens in bfloat16" in done.out
    assert not done.errors("check_export.py")


def test_export_in_bfloat16_writes_what_training_wrote(
    base: TrainingRun, export: Path, check_here: Check
) -> None:
    half = consolidate(base, "bfloat16")
    assert check_here(half, base).good().out.count("they agree") == 2
    whole = load_file(export / "model.safetensors")
    assert_same(load_file(half / "model.safetensors"), {n: v.bfloat16() for n, v in whole.items()})


def test_check_tells_another_text(
    base: TrainingRun, export: Path, tmp_path: Path, check_here: Check
) -> None:
    summary = json.loads((base.out / "summary.json").read_text())
    text = summary["generated"]["ema"]
    assert len(text) == 24
    text[-1] ^= 1
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "hf").symlink_to(base.out / "hf")
    done = check_here(export, dataclasses.replace(base, out=tmp_path))
    assert done.code == 1
    assert "in training: THEY DIFFER" in done.out


def test_check_refuses_a_corpus_that_has_changed(
    base: TrainingRun, export: Path, corpus: Path, tmp_path: Path, check_here: Check
) -> None:
    summary = json.loads((base.out / "summary.json").read_text())
    changed = shutil.copytree(corpus, tmp_path / "corpus")
    (changed / "0.txt").write_text("other words " * 4000)
    summary["evaluation"]["data"] = [str(changed)]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "hf").symlink_to(base.out / "hf")
    done = check_here(export, dataclasses.replace(base, out=tmp_path))
    assert done.code == 2
    (line,) = done.errors("check_export.py")
    assert str(changed) in line and "has changed since" in line


def test_check_tells_raw_weights_from_the_average(
    base: TrainingRun, export: Path, tmp_path: Path, check_here: Check
) -> None:
    """The classic mistake: everything fits, but for whose weights they are."""
    wrong = shutil.copytree(export, tmp_path / "wrong")
    (file,) = wrong.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        average = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    raw = weights_of(base.checkpoint(6))
    assert any(not torch.equal(raw[name], value) for name, value in average.items())
    save_file({name: raw[name] for name in average}, file, metadata=header)
    done = check_here(wrong, base)
    assert done.code == 1
    assert "THEY DIFFER" in done.out
    assert "Traceback" not in done.err


# ---------------------------------------------------------------------- the same run by other ways


def test_same_seed_gives_the_same_run(base: TrainingRun, again: TrainingRun) -> None:
    assert again.losses() == base.losses()
    assert_same(average_of(again.checkpoint(6)), average_of(base.checkpoint(6)))


def test_resume_auto_from_nothing_starts_from_scratch_and_says_so(again: TrainingRun) -> None:
    line = again.line("resume ")
    assert "starting from scratch" in line and str(again.out) in line
    assert list(again.rows()) == [1, 2, 3, 4, 5, 6]


def test_another_seed_gives_another_run(base: TrainingRun, several: TrainingRun) -> None:
    assert base.losses()[1, "train_loss"] != several.losses()[1, "train_loss"]


@pytest.fixture(scope="module")
def ddp(folder: Path, corpus: Path) -> TrainingRun:
    return finished(folder, "ddp", corpus, 2, "--parallel", "ddp", *AVERAGE)


@pytest.mark.parametrize(
    ("name", "layout"), [("ddp", "ddp, world size 2"), ("alone", "none, world size 1")]
)
def test_layouts_give_the_same_losses(
    base: TrainingRun, name: str, layout: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(name)
    assert run.losses() == pytest.approx(base.losses(), rel=0, abs=1e-5)
    assert f"parallel   {layout}" in run.text


def test_run_resumed_on_fewer_ranks_gives_the_losses_of_the_uninterrupted_one(
    base: TrainingRun, folder: Path, corpus: Path
) -> None:
    flags = ("--parallel", "fsdp2", *AVERAGE, "--resume", base.checkpoint(4))
    run = finished(folder, "resumed", corpus, 1, *flags)
    assert "resume     from" in run.text and "at step 4" in run.text
    expected = {key: value for key, value in base.losses().items() if key[0] > 4}
    # 1e-3 is what is promised; what is left is the order in which two ranks sum their gradients.
    assert run.losses() == pytest.approx(expected, rel=0, abs=1e-5)


def test_average_is_bit_equal_after_it_was_loaded_on_fewer_ranks(
    base: TrainingRun, folder: Path, corpus: Path
) -> None:
    # With updates so far apart the average moves no more: what is saved is what was loaded.
    flags = (*AVERAGE, "--ema-update-every", "1000", "--resume", base.checkpoint(4))
    run = finished(folder, "untouched", corpus, None, *flags)
    assert_same(average_of(run.checkpoint(6)), average_of(base.checkpoint(4)))
    moved = weights_of(run.checkpoint(6))
    before = weights_of(base.checkpoint(4))
    assert any(not torch.equal(moved[name], before[name]) for name in before)


def test_several_averages_with_late_start_and_windows(several: TrainingRun) -> None:
    """Each profile against a plain loop over the raw weights in the stock checkpoints."""
    raw = {step: weights_of(several.checkpoint(step)) for step in (4, 6, 8)}
    stored = average_of(several.checkpoint(8))
    for profile, text in PROFILES.items():
        schedule = parse_schedule(text)
        got = {
            key.removeprefix(f"{profile}."): value
            for key, value in stored.items()
            if key.startswith(f"{profile}.")
        }
        want = {name: raw[4][name].clone() for name in got}
        for step in (6, 8):
            first = step - 4 - 1  # of the two steps since the last update, counted from the start
            kept = schedule.decay(first) * schedule.decay(first + 1)
            for name, value in want.items():
                value.lerp_(raw[step][name], 1 - kept)
        assert_same(got, want)
    rows = several.rows()
    for profile in PROFILES:
        # Before it begins, the average is the weights themselves.
        assert rows[3][f"ema_loss/{profile}"] == rows[3]["raw_loss"]
        assert rows[8][f"ema_loss/{profile}"] != rows[8]["raw_loss"]
    assert len({rows[8][f"ema_loss/{profile}"] for profile in PROFILES}) == len(PROFILES)


def test_sweep_finds_the_loss_of_what_was_tracked(several: TrainingRun, tmp_path: Path) -> None:
    """However few the updates, a stored width is among what can be expressed."""
    done = sweep(several, tmp_path / "sweep", "0.1").good()
    with (tmp_path / "sweep" / "sigma_rel.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert abs(float(row["loss"]) - several.rows()[8]["ema_loss/wide"]) < 1e-5
    assert (tmp_path / "sweep" / "sigma_rel.png").read_bytes()[:4] == b"\x89PNG"
    assert "residual" in done.out


def test_the_commands_that_it_prints_work(several: TrainingRun) -> None:
    """Wherever the environment of the run is, on the path or not; no average is named ema."""
    for line, said in (("export ", "consolidate"), ("check ", "they agree")):
        command = shlex.split(several.line(line))[1:]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stderr


def test_runs_side_by_side(
    base: TrainingRun, again: TrainingRun, several: TrainingRun, capsys: pytest.CaptureFixture[str]
) -> None:
    from compare_runs import main

    assert main([str(base.out), str(again.out)]) == 0
    said = capsys.readouterr().out
    loss, average = base.rows()[6]["raw_loss"], base.rows()[6]["ema_loss/ema"]
    assert said.count(f"raw weights {loss:.4f}   average 'ema' {average:.4f}") == 2
    better = "better" if average < loss else "WORSE"
    assert f"the average is {better} by {abs(loss - average):.4f}" in said
    lowest = "raw weights" if loss < average else "average 'ema'"
    assert f"lowest: {lowest} of {base.out}, {min(loss, average):.4f}" in said
    assert (base.out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert main([str(base.out), str(several.out)]) == 2
    assert "different text" in capsys.readouterr().err


# ---------------------------------------------------------------------- wrong use


def test_missing_data_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    done = train(2, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.code != 0  # torchrun's own; what its processes ended with is in its report
    assert "exitcode  : 2" in done.err
    (line,) = done.errors("train.py")
    assert "nowhere" in line and "no such file or directory" in line


def test_nothing_to_resume_at_a_path(corpus: Path, tmp_path: Path) -> None:
    done = train(None, "--data", corpus, "--resume", tmp_path / "nothing")
    assert done.code == 2
    (line,) = done.errors("train.py")
    assert "nothing" in line and "no complete checkpoint" in line
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_contradictory_flags_end_the_program(tmp_path: Path) -> None:
    done = train(None, "--out", tmp_path, "--ema-start-step", "3")
    assert done.code == 2
    assert done.errors("train.py") == ["train.py: error: --ema-start-step needs --ema"]
    assert list(tmp_path.iterdir()) == []
