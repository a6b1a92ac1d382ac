"""Averages built after training: the right sums of the right snapshots, or nothing at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from sharded_ema.averaging.schedules import Power
from sharded_ema.checkpoint.reading.manifest import dump_manifest, parse_manifest
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.checkpoint.writing.stock_writer import StockStorageWriter
from sharded_ema.cli import main
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointExistsError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
)
from sharded_ema.tools.casting import round_once
from sharded_ema.tools.synthesize import synthesize
from tests.helpers.checkpoints import flip, grid, make, meta, meta_bytes, ranges, rows, whole

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = {"a": 0.05, "b": 0.10}
SHAPES = {"layers.w": (9, 6), "bias": (11,), "scale": (), "empty": (0, 4), "conv": (3, 2, 4, 5)}
# Snapshots of one run need not be sharded alike.
CHUNKINGS = [whole, rows(3), grid, ranges(3)]


def said(at: int, **changes: Any) -> dict[str, Any]:
    """What a snapshot of step ``at`` says of itself; seeded at 0, updated at every step."""
    profiles = {
        name: {"schedule": Power(sigma_rel=width).to_dict(), "decay": 0.9, "seed_weight": 0.0}
        for name, width in NAMES.items()
    }
    counters = dict.fromkeys(("step", "applied_steps", "last_lerp_step", "num_updates"), at)
    return meta(**{"profiles": profiles, **counters, **changes})


class Trained:
    """A run of random weights, and its averages by a plain loop in float64."""

    def __init__(self, steps: int, widths: dict[str, float], every: int = 1) -> None:
        random = np.random.default_rng(0)
        now = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
        schedules = {name: Power(sigma_rel=width) for name, width in widths.items()}
        averages = {profile: dict(now) for profile in widths}
        self.at: dict[int, dict[str, dict[str, np.ndarray]]] = {}
        for step in range(1, steps + 1):
            now = {k: v + random.standard_normal(v.shape) / 8 for k, v in now.items()}
            if step % every:
                continue
            for profile, schedule in schedules.items():
                kept = np.prod([schedule.decay(n) for n in range(step - every + 1, step + 1)])
                averages[profile] = {
                    k: kept * averages[profile][k] + (1 - kept) * v for k, v in now.items()
                }
            self.at[step] = {profile: dict(average) for profile, average in averages.items()}

    def save(self, run: Path, steps: range, dtype: str = "f4", **changes: Any) -> Path:
        """Snapshots of the profiles ``a`` and ``b``, with a frozen tensor and a counter."""
        for number, step in enumerate(steps):
            tensors = {
                f"{profile}.{name}": np.asarray(value, dtype)
                for profile in NAMES
                for name, value in self.at[step][profile].items()
            }
            tensors |= {
                "_frozen.head": np.full((2, 3), 1 / 3, dtype),
                "_buffers.count": np.array(step),
            }
            chunking = CHUNKINGS[number % len(CHUNKINGS)]
            make(run / f"step_{step}", tensors, chunking, metas={"": said(step, **changes)})
        return run


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained(120, {**NAMES, "between": 0.07, "wide": 0.12})


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    return trained.save(tmp_path / "run", range(12, 121, 12))


def build(run: Path, out: Path, widths: Any = 0.07, **options: Any) -> Any:
    return synthesize(run, sigma_rel=widths, out=out, progress=False, **options)


def model(out: Path, width: float = 0.07) -> dict[str, np.ndarray]:
    return load_file(out / f"sigma_rel_{width!r}" / "model.safetensors")


def header(out: Path, width: float = 0.07) -> dict[str, str]:
    with safe_open(out / f"sigma_rel_{width!r}" / "model.safetensors", "np") as opened:
        return opened.metadata()


def test_close_to_what_was_tracked(trained: Trained, run: Path, tmp_path: Path) -> None:
    report = build(run, tmp_path / "out", [0.07, 0.12, 0.05, 0.1])
    assert report.ok and report.facts["snapshots"] == list(range(12, 121, 12))
    for width, name in ((0.07, "between"), (0.12, "wide"), (0.05, "a"), (0.1, "b")):
        found, wanted = model(tmp_path / "out", width), trained.at[120][name]
        other = trained.at[120]["a" if name == "b" else "b"]
        residual = report.facts["widths"][str(width)]["residual"]
        for key in ("layers.w", "bias", "conv"):
            error = np.abs(found[key] - wanted[key]).max()
            assert error < max(1e-5, residual), (width, key)
            assert error < 0.1 * np.abs(other[key] - wanted[key]).max(), "and far from another one"


def test_sums_are_exact_and_rounded_once(trained: Trained, run: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        build(run, tmp_path / dtype, [0.07, 0.12], dtype=dtype)
    for width in (0.07, 0.12):
        parts = json.loads(header(tmp_path / "float32", width)["coefficients"])
        assert len(parts) == 20
        narrow = load_torch(tmp_path / "bfloat16" / f"sigma_rel_{width}" / "model.safetensors")
        for key in ("layers.w", "bias", "scale", "conv"):
            total = np.zeros(SHAPES[key])
            for step, profile, factor in parts:
                total += factor * trained.at[step][profile][key].astype("f4").astype("f8")
            found = model(tmp_path / "float32", width)[key]
            assert np.array_equal(found, total.astype("f4"))
            # Nearest in bfloat16: no further than half a step, whatever lies between.
            near = narrow[key].double().numpy()
            assert (np.abs(near - total) <= np.abs(total) * 2.0**-8).all()


def test_rounding_happens_once() -> None:
    # On the way to bfloat16 fp32 would round each of them to a tie, or to infinity.
    values = np.array([1 + 2**-8 + 2**-40, -1 - 2**-8 - 2**-40, 1 + 2**-8 - 2**-40, 1 + 2**-8])
    values = np.append(values, [3.4e38, 1e300, -1e300, np.inf, np.nan, 0.0])
    found = torch.from_numpy(round_once(values.copy(), "BF16").view("u2").copy()).view(
        torch.bfloat16
    )
    step = 2**-7
    assert found[:4].tolist() == [1 + step, -1 - step, 1, 1]
    assert found[5:8].tolist() == [np.inf, -np.inf, np.inf] and found[8].isnan() and found[9] == 0
    half = round_once(np.array([1 + 2**-11 + 2**-40]), "F16").view("f2")
    assert half[0] == 1 + 2**-10


def test_snapshots_in_the_format_of_torch(trained: Trained, run: Path, tmp_path: Path) -> None:
    build(run, tmp_path / "ours")
    for step in range(12, 121, 12):
        state: dict[str, torch.Tensor] = {
            f"{name}.{key}": torch.from_numpy(np.asarray(value, "f4"))
            for name in NAMES
            for key, value in trained.at[step][name].items()
        }
        state |= {"_frozen.head": torch.full((2, 3), 1 / 3), "_buffers.count": torch.tensor(step)}
        state["_meta"] = torch.from_numpy(meta_bytes(**said(step)).copy())
        place = tmp_path / "stock" / f"step_{step}"
        if step % 24:  # below a prefix, in a checkpoint that knows nothing of this library
            dcp.save({"ema": state, "model": torch.ones(3)}, checkpoint_id=place, no_dist=True)
        else:
            dcp.save(state, storage_writer=StockStorageWriter(place), no_dist=True)
    assert build(tmp_path / "stock", tmp_path / "theirs").ok
    wanted, found = model(tmp_path / "ours"), model(tmp_path / "theirs")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], value) for key, value in wanted.items())
    (shard,) = (tmp_path / "stock" / "step_48").glob("*.distcp")
    flip(shard, shard.stat().st_size - 200)
    with pytest.raises(CheckpointCorruptError):
        build(tmp_path / "stock", tmp_path / "damaged")


def test_what_is_not_averaged_comes_from_the_last_snapshot(run: Path, tmp_path: Path) -> None:
    build(run, tmp_path / "out", step=60)
    found = model(tmp_path / "out")
    assert found.keys() == {*SHAPES, "head", "count"}
    assert found["count"] == 60 and found["count"].dtype == np.int64
    assert np.array_equal(found["head"], np.full((2, 3), 1 / 3, "f4"))
    assert found["empty"].shape == (0, 4)


def test_header_says_how_it_was_made(run: Path, tmp_path: Path) -> None:
    report = build(run, tmp_path / "out", step=36)
    said = header(tmp_path / "out")
    assert said["kind"] == "ema" and said["sigma_rel"] == "0.07" and said["step"] == "36"
    assert said["source_steps"] == "12,24,36" and said["num_updates"] == "36"
    assert float(said["residual"]) == report.facts["widths"]["0.07"]["residual"] > 0
    assert sum(part[2] for part in json.loads(said["coefficients"])) == pytest.approx(1, abs=1e-12)
    assert "7 snapshots after step 36 left aside" in report.text()


@pytest.mark.parametrize("budget", [1 << 10, 1 << 14])
def test_blocks_files_and_jobs_change_nothing(
    run: Path, tmp_path: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(run, tmp_path / "plain", [0.07, 0.12])
    monkeypatch.setattr("sharded_ema.tools.sums.BUDGET_BYTES", budget)
    build(run, tmp_path / "parts", [0.07, 0.12], max_shard_size=300, jobs=3)
    for width in (0.07, 0.12):
        folder = tmp_path / "parts" / f"sigma_rel_{width}"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
        wanted = model(tmp_path / "plain", width)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[k], v) for k, v in wanted.items())


@pytest.mark.parametrize("every", [4, 10])
def test_counting_from_a_later_seed_in_windows(every: int, tmp_path: Path) -> None:
    trained = Trained(120, {**NAMES, "between": 0.07}, every)
    for step in range(20, 121, 20):
        counters = {"step": 1000 + step, "applied_steps": 503 + step, "last_lerp_step": 500 + step}
        trained.save(
            tmp_path / "run", range(step, step + 1), **counters, seed_step=500, start_step=500,
            num_updates=step + 3, update_every=every,
        )  # fmt: skip
    report = build(tmp_path / "run", tmp_path / "out")
    assert report.facts["updates"] == 120 // every and report.facts["step"] == 1120
    difference = model(tmp_path / "out")["conv"] - trained.at[120]["between"]["conv"]
    assert np.abs(difference).max() < max(1e-6, report.facts["widths"]["0.07"]["residual"])


@pytest.mark.parametrize("place", ["step_{}", "step_{}/ema", "checkpoints/step_{}/ema"])
def test_places(trained: Trained, tmp_path: Path, place: str) -> None:
    trained.save(tmp_path / "flat", range(40, 121, 40))
    for step in (40, 80, 120):
        (tmp_path / "run" / place.format(step)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat" / f"step_{step}").rename(tmp_path / "run" / place.format(step))
    last = tmp_path / "run" / place.format(120)
    for name in ("ema", "the_last"):  # before and behind it in the order of names
        (tmp_path / "run" / name).symlink_to(os.path.relpath(last, tmp_path / "run"))
    unfinished = last.with_name(f"step_140.tmp-{'0' * 32}")
    unfinished.mkdir()
    (unfinished / "manifest.json").touch()
    assert build(tmp_path / "run", tmp_path / "out").facts["snapshots"] == [40, 80, 120]


def test_what_cannot_be_expressed_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = trained.save(tmp_path / "run", range(60, 121, 60))
    report = build(run, tmp_path / "out", [0.09, 0.02, 0.25])
    assert not report.ok and len(report.problems) == 2
    assert "sigma_rel 0.02" in report.problems[0] and "--max-residual" in report.problems[0]
    assert report.facts["widths"]["0.09"]["residual"] < 0.05
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    assert build(run, tmp_path / "out", [0.09, 0.02], max_residual=1).ok


def test_profiles_that_are_too_alike_are_refused(trained: Trained, tmp_path: Path) -> None:
    profiles = {
        name: {"schedule": Power(gamma=gamma).to_dict(), "decay": 0.9, "seed_weight": 0.0}
        for name, gamma in (("a", 16.97), ("b", 16.97 + 1e-7))
    }
    run = trained.save(tmp_path / "run", range(60, 121, 60), profiles=profiles)
    report = build(run, tmp_path / "out", 0.055, max_residual=0.2)
    assert not report.ok and "rounding errors" in report.text()


POWER = {"schedule": Power(sigma_rel=0.05).to_dict(), "decay": 0.9, "seed_weight": 0.0}
CONSTANT = {"schedule": {"type": "Constant", "decay": 0.9}, "decay": 0.9, "seed_weight": 0.0}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"profiles": {"a": CONSTANT, "b": CONSTANT}}, {}, "no power-function profile"),
        ({"profiles": {"a": POWER, "b": CONSTANT}}, {"profiles": ["b"]}, "profile 'b'; it has"),
        ({}, {"profiles": ["other"]}, "'other'; it has"),
        ({}, {"step": 70}, r"no snapshot of step 70.*\[60, 120\]"),
        ({"seed_step": None}, {}, "has had no update"),
        ({"last_lerp_step": 0}, {}, "has had no update"),
        ({"update_every": 7}, {}, "update_every was changed"),
        ({"profiles": {"a": {**POWER, "seed_weight": 0.3}}}, {}, "did not begin at the seed"),
    ],
)
def test_runs_without_a_known_weighting_are_refused(
    trained: Trained, tmp_path: Path, changes: dict, options: dict, message: str
) -> None:
    run = trained.save(tmp_path / "run", range(60, 121, 60), **changes)
    with pytest.raises(CheckpointMismatchError, match=message):
        build(run, tmp_path / "out", **options)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_snapshots_that_do_not_belong_together(trained: Trained, tmp_path: Path) -> None:
    same = {f"{p}.{k}": np.zeros(shape, "f4") for p in NAMES for k, shape in SHAPES.items()}
    smaller = {key: np.zeros(3, "f4") for key in same}

    def last_one_with(name: str, tensors: dict | None = None, **changes: Any) -> Path:
        run = trained.save(tmp_path / name, range(60, 61))
        make(run / "step_120", tensors or same, metas={"": said(120, **changes)})
        return run

    for run, message in (
        (last_one_with("shapes", smaller), "other tensors"),
        (last_one_with("window", update_every=10), "update_every was changed"),
        (last_one_with("schedule", profiles={"a": CONSTANT}), "has the schedule"),
        (last_one_with("order", last_lerp_step=30), "not of one run"),
    ):
        with pytest.raises(CheckpointMismatchError, match=message):
            build(run, tmp_path / "out")
    report = build(last_one_with("reseeded", seed_step=20), tmp_path / "out", [0.05, 0.1])
    assert report.facts["snapshots"] == [120] and "seeded at another step" in report.text()
    make(tmp_path / "order" / "twin", smaller, metas={"": said(60)})
    with pytest.raises(CheckpointMismatchError, match="both of step 60"):
        build(tmp_path / "order", tmp_path / "out2")


def test_saves_in_a_row_count_once(trained: Trained, tmp_path: Path) -> None:
    run = trained.save(tmp_path / "run", range(40, 121, 40))
    trained.save(tmp_path / "more", range(120, 121), step=121)
    (tmp_path / "more" / "step_120").rename(run / "step_121")
    report = build(run, tmp_path / "out")
    assert report.facts["snapshots"] == [40, 80, 121]
    assert len(json.loads(header(tmp_path / "out")["coefficients"])) == 6


def test_snapshots_that_are_older_than_earlier_ones_are_told(run: Path, tmp_path: Path) -> None:
    for step in range(12, 121, 12):
        file = run / f"step_{step}" / "manifest.json"
        manifest = parse_manifest(file.read_bytes(), "")
        file.write_bytes(dump_manifest(replace(manifest, saved_at=1000 + step)))
    assert not build(run, tmp_path / "good").notes
    file = run / "step_60" / "manifest.json"
    manifest = parse_manifest(file.read_bytes(), "")
    file.write_bytes(dump_manifest(replace(manifest, saved_at=2000)))
    (note,) = build(run, tmp_path / "mixed").notes
    assert "two runs are mixed" in note


def test_nothing_there(tmp_path: Path) -> None:
    for place, said in ((tmp_path, "checkpoints"), (tmp_path / "missing", "there is no run")):
        with pytest.raises(CheckpointNotFoundError, match=said):
            build(place, tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"widths": []},
        {"widths": [0.1, 0.1]},
        {"widths": 0.3},
        {"widths": 0.0},
        {"jobs": 0},
        {"max_residual": 0},
        {"dtype": "int8"},
        {"max_shard_size": "much"},
    ],
)
def test_wrong_use(run: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(ConfigError):
        build(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_damage_and_taken_targets_leave_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(CheckpointExistsError):
        build(run, tmp_path / "taken")
    with pytest.raises(ConfigError, match="inside the checkpoint"):
        build(run, run / "step_60" / "out")
    chunk = open_checkpoint(run / "step_60").tensors["b.conv"].chunks()[-1]
    flip(run / "step_60" / chunk.file, chunk.byte_offset + chunk.num_bytes - 1)
    with pytest.raises(CheckpointCorruptError, match=r"b\.conv"):
        build(run, tmp_path / "out", [0.07, 0.12])
    assert {p.name for p in tmp_path.iterdir()} == {"run", "taken"}


KILLED = """
import os, sys
from sharded_ema.tools import synthesize
written, original = 0, os.write
def write(descriptor, data):
    global written
    written += 1
    if written == 9:
        os.kill(os.getpid(), 9)
    return original(descriptor, data)
os.write = write
synthesize.synthesize(sys.argv[1], sigma_rel=[0.07, 0.12], out=sys.argv[2], progress=False)
"""


def test_a_kill_publishes_nothing(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(run), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    (left,) = {p.name for p in tmp_path.iterdir()} - {"run"}
    assert left.startswith("out.tmp-")
    assert build(run, tmp_path / "out", [0.07, 0.12]).ok
    assert {p.name for p in tmp_path.iterdir()} == {"run", "out"}


def test_like(run: Path, tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text("config")
    weights = {name: np.zeros(shape, "f4") for name, shape in SHAPES.items()}
    weights |= {"head": np.zeros((2, 3), "f4"), "count": np.array(0)}
    save_file(weights, like / "model.safetensors")
    assert build(run, tmp_path / "out", [0.07, 0.12], like=like).ok
    for folder in (tmp_path / "out").iterdir():
        assert (folder / "config.json").read_text() == "config"
    save_file({**weights, "bias": np.zeros(12, "f4")}, like / "model.safetensors")
    assert not build(run, tmp_path / "other", like=like).ok
    assert not (tmp_path / "other").exists()


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["synthesize", str(run), "--sigma-rel", "0.07,0.12", "--no-progress", "--json"]
    assert (
        main([*command, "--out", str(tmp_path / "out"), "--step", "60", "--profiles", "a,b"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["facts"]["step"] == 60
    assert {w["output"] for w in said["facts"]["widths"].values()} == {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert main([*command, "--out", str(tmp_path / "two"), "--max-residual", "1e-9"]) == 1
    assert main([*command, "--out", str(tmp_path / "two"), "--step", "61"]) == 2
    with pytest.raises(SystemExit):
        main(["synthesize", str(run), "--sigma-rel", "wide", "--out", "x"])


# ru_maxrss would include the peak of the process that started this one.
PEAK = """
import os, re, sys
from pathlib import Path
from sharded_ema.checkpoint.files import Directory
from sharded_ema.tools.synthesize import synthesize
most = 0
read = Directory.read_into
def counted(self, *arguments):
    global most
    read(self, *arguments)
    most = max(most, len(os.listdir("/proc/self/fd")))
Directory.read_into = counted
widths = [0.05 + 0.005 * i for i in range(int(sys.argv[3]))]
assert synthesize(sys.argv[1], sigma_rel=widths, out=sys.argv[2], progress=False).ok
assert "torch" not in sys.modules
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024, most)
"""


def test_memory_and_open_files_are_bounded(tmp_path: Path) -> None:
    weights = np.ones((512, 2048), "f4")  # 4 MB, and 80 of them in all
    for number in range(40):
        step = 12 * (number + 1)
        tensors = {f"{name}.w": weights for name in NAMES}
        make(tmp_path / "run" / f"step_{step}", tensors, grid, metas={"": said(step)})
    command = [sys.executable, "-c", PEAK, str(tmp_path / "run"), str(tmp_path / "out"), "4"]
    peak = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes, files = map(int, peak.stdout.split())
    assert megabytes < 128 and files < 50, (megabytes, files)
    found = load_file(tmp_path / "out" / "sigma_rel_0.05" / "model.safetensors")["w"]
    assert np.array_equal(found, weights), "weights that never changed stay what they are"
