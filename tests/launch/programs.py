"""The programs in ``launch/``, run as their users run them, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sharded_ema.checkpoint.storage_reader import SafetensorsStorageReader

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
# A run that has not ended by then hangs; the slowest takes about a tenth of it.
TIMEOUT = 150.0
TINY = (
    *("--hidden-size", "32", "--layers", "1", "--heads", "2", "--kv-heads", "1"),
    *("--context", "32", "--batch-size", "6", "--steps", "6", "--data-bytes", "300000"),
    *("--eval-every", "3", "--eval-sequences", "4", "--save-every", "2", "--keep-last", "3"),
    # The rate is high and at its peak soon, so that six steps part the average from the weights.
    *("--generate-bytes", "24"),
    *("--log-every", "1", "--warmup-steps", "1", "--lr", "0.02"),
)
# What a program would take for its own if these tests were themselves started by a launcher.
OTHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SHARDED_EMA_IMPL")
AVERAGE = ("--ema", "--ema-decay", "0.9")


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    out: str
    err: str

    def good(self) -> Finished:
        """Itself, if it ended well; else the test fails with what it wrote."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err[-4000:]}"
        return self

    def errors(self, program: str) -> list[str]:
        """The lines that tell the user what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith(f"{program}: error:")]


@dataclass(frozen=True)
class TrainingRun:
    """A finished training run and its output directory."""

    out: Path
    text: str
    err: str

    def rows(self) -> dict[int, dict[str, float]]:
        """The rows of metrics.jsonl by step."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return {row["step"]: row for row in map(json.loads, lines)}

    def losses(self) -> dict[tuple[int, str], float]:
        """Every loss by step and name."""
        return {
            (step, name): value
            for step, row in self.rows().items()
            for name, value in row.items()
            if "loss" in name
        }

    def line(self, start: str) -> str:
        """The one line of its output that begins so."""
        (line,) = [line for line in self.text.splitlines() if line.startswith(start)]
        return line

    def checkpoint(self, step: int) -> Path:
        return self.out / "checkpoints" / f"step_{step:06d}"


def execute(*argv: str | Path) -> Finished:
    """Run Python with ``argv``, as on a machine with nothing but this checkout and CPUs."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in OTHERS and not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Two ranks need two GPUs where there are any; on CPUs the runs are the same everywhere.
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *map(str, argv)], env=env, capture_output=True, text=True, timeout=TIMEOUT
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def train(ranks: int | None, *flags: str | Path) -> Finished:
    """Start the training program: by torchrun with ``ranks``, or with None as one process."""
    torchrun: Sequence[str] = ()
    if ranks is not None:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return execute(*torchrun, LAUNCH / "train.py", *TINY, *flags)


def check_export(export: Path, run: TrainingRun) -> Finished:
    return execute(LAUNCH / "check_export.py", export, run.out, "--sample-bytes", "4")


def sweep(run: TrainingRun, out: Path, widths: str) -> Finished:
    return execute(LAUNCH / "sweep_sigma.py", run.out, "--sigma-rel", widths, "--out", out)


def load_tensors(reader: StorageReader) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, by the means of any user of DCP."""
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and key != "_meta"
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def average_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_tensors(SafetensorsStorageReader(checkpoint / "ema", verify=True))


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """The raw weights by the names of the bare model, from the stock checkpoint beside ours."""
    found = load_tensors(FileSystemReader(checkpoint / "train"))
    return {
        key.removeprefix("model."): value
        for key, value in found.items()
        if key.startswith("model.")
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and want
    for name in want:
        assert torch.equal(got[name], want[name]), name


def finished(
    folder: Path, name: str, corpus: Path, ranks: int | None, *flags: str | Path
) -> TrainingRun:
    out = folder / name
    done = train(ranks, "--data", corpus, "--out", out, *flags).good()
    return TrainingRun(out, done.out, done.err)


def consolidate(run: TrainingRun, dtype: str | None = None) -> Path:
    """Export the last average by the command that the run itself printed."""
    command = run.line("export ").split()[2:]
    assert command[0] == "consolidate" and command[-2:] == ["--like", str(run.out / "hf")]
    if dtype is not None:
        command[2] += f"-{dtype}"
        command += ["--dtype", dtype]
    execute("-m", "sharded_ema", *command, "--no-progress").good()
    return Path(command[2])
