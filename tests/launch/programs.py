"""The programs in ``launch/``, run as their users run them, and what they leave behind."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sharded_ema import SafetensorsStorageReader

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
CONFIGS = LAUNCH / "configs"
# A run that has not ended by then hangs; the slowest takes about a tenth of it.
TIMEOUT = 150.0
TINY = (
    *("--hidden-size", "32", "--layers", "1", "--heads", "2", "--kv-heads", "1"),
    *("--context", "32", "--batch-size", "6", "--steps", "6", "--data-bytes", "300000"),
    *("--eval-every", "3", "--eval-sequences", "4", "--save-every", "2", "--keep-last", "3"),
    # The rate is high and at its peak soon, so that six steps part the average from the weights.
    *("--generate-tokens", "24"),
    *("--log-every", "1", "--warmup-steps", "1", "--lr", "0.02"),
)
# What a program would take for its own if these tests were themselves started by a launcher.
OTHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SHARDED_EMA_IMPL")
AVERAGE = ("--ema", "--ema-decay", "0.9")

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install '.[deepspeed]'",
)


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


# ---------------------------------------------------------------------- starting them


def environment(add: Mapping[str, str] | None = None) -> dict[str, str]:
    """That of a machine with nothing but this checkout and CPUs, and what is to be added."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in OTHERS and not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= add or {}
    # Two ranks need two GPUs where there are any; on CPUs the runs are the same everywhere.
    env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def execute(*argv: str | Path, add: Mapping[str, str] | None = None) -> Finished:
    """Run Python with ``argv`` in ``environment(add)``."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        env=environment(add),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def train(ranks: int | None, *flags: str | Path) -> Finished:
    """Start the training program: by torchrun with ``ranks``, or with None as one process.

    A single rank is started without torchrun, in the environment that torchrun makes.
    """
    program = (LAUNCH / "train.py", *TINY, *flags)
    if ranks is None:
        return execute(*program)
    if ranks == 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        sizes = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        return execute(*program, add={"RANK": "0", "LOCAL_RANK": "0", **sizes, **where})
    return execute(*torchrun(ranks), *program)


def torchrun(ranks: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def accelerate(
    config: str, *flags: str | Path, start: Path | None = None, ranks: int = 2
) -> Finished:
    """Start the training program by accelerate with a configuration that we ship.

    Args:
        start: a program that starts it in turn.
    """
    program = [LAUNCH / "train.py"] if start is None else [start, LAUNCH / "train.py"]
    return execute(
        *("-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--num_processes", str(ranks)),
        *("--config_file", CONFIGS / f"accelerate_{config}.yaml"),
        *(*program, "--parallel", "accelerate", *TINY, *flags),
    )


def deepspeed(config: str, *flags: str | Path) -> Finished:
    """Start it on two ranks by DeepSpeed's launcher, which adds ``--local_rank``, with our file."""
    return execute(
        *(Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2"),
        *("--master_port", free_port(), LAUNCH / "train.py", *TINY),
        *("--deepspeed", CONFIGS / f"{config}.json", *flags),
    )


def config_file(folder: Path, **sections: object) -> Path:
    """A configuration of DeepSpeed, ZeRO-1 unless the sections say otherwise."""
    path = folder / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **sections}))
    return path


def finished(
    folder: Path, name: str, corpus: Path, ranks: int | None, *flags: str | Path
) -> TrainingRun:
    out = folder / name
    done = train(ranks, "--data", corpus, "--out", out, *flags).good()
    return TrainingRun(out, done.out, done.err)


def check_export(export: Path, run: TrainingRun) -> Finished:
    return execute(LAUNCH / "check_export.py", export, run.out, "--sample-tokens", "4")


Check = Callable[[Path, TrainingRun], Finished]


def sweep(run: TrainingRun, out: Path, widths: str) -> Finished:
    return execute(LAUNCH / "sweep_sigma.py", run.out, "--sigma-rel", widths, "--out", out)


def consolidate(run: TrainingRun, dtype: str | None = None) -> Path:
    """Export the last average by the command that the run itself printed."""
    command = run.line("export ").split()
    command = command[command.index("consolidate") :]
    assert command[-2:] == ["--like", str(run.out / "hf")]
    if dtype is not None:
        command[2] += f"-{dtype}"
        command += ["--dtype", dtype]
    execute("-m", "sharded_ema", *command, "--no-progress").good()
    return Path(command[2])


# ---------------------------------------------------------------------- what they leave behind


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
