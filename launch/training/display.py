"""What a run tells its user on the terminal: first lines, progress, and where everything lies."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from sharded_ema import Schedule
from sharded_ema.averaging.schedules import horizon
from training.recording import Row, peak_memory
from training.run import Run

CHECK = Path(__file__).resolve().parents[1] / "check_export.py"


class Progress:
    """A progress bar on a terminal, and lines above it; on the first rank alone."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._bar = tqdm(
            total=run.options.steps,
            initial=run.step,
            unit="step",
            # None: where the output is no terminal, a bar would fill a log file.
            disable=None if run.ranks.first else True,
            mininterval=1.0,
        )

    def advance(self) -> None:
        """One more step."""
        self._bar.update()

    def show_row(self, row: Row) -> None:
        """Beside the bar: loss, speed and memory of the last training steps."""
        self._bar.set_postfix(
            loss=f"{row['train_loss']:.3f}",
            speed=f"{row['tokens_per_second']:,.0f} tokens/s",
            memory=f"{row['peak_memory'] / 2**30:.2f} GiB",
        )

    def show_results(self, results: dict[str, float]) -> None:
        """In a line: the losses of an evaluation."""
        report = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
        _say(self._run, f"step {self._run.step:>6}  {report}")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def introduce(run: Run) -> None:
    """Say what is trained, how, on what, and what is averaged; all ranks take part."""
    for line in _introduction(run):
        _say(run, line)


def conclude(
    run: Run, picture: Path, average: Path | None, seconds: float, rows: Sequence[Row]
) -> None:
    """Say where the results lie, and how to export and check the average.

    Args:
        rows: the metrics; the last one has the speed, if any step was made.
    """
    speed = f"{rows[-1]['tokens_per_second']:,.0f} tokens/s at the end, " if rows else ""
    memory = f"at most {peak_memory(run.ranks.device) / 2**30:.2f} GiB in the first process"
    _say(run, f"done       {run.step} steps in {seconds:.0f} s; {speed}{memory}")
    _say(run, f"curves     {picture}")
    _say(run, f"checkpoint {run.saved}")
    if average is not None:
        export = run.out / "export"
        tool = _found("sharded-ema", "-m", "sharded_ema")
        command = [*tool, "consolidate", average, export, "--like", run.out / "hf"]
        if "ema" not in run.options.profiles:
            command += ["--profile", next(iter(run.options.profiles))]
        _say(run, f"export     {shlex.join(map(str, command))}")
        command = [*_found("python"), os.path.relpath(CHECK), export, run.out]
        _say(run, f"check      {shlex.join(map(str, command))}")


def tell_preempted(run: Run) -> None:
    """Say that a signal has ended the run early, and how it goes on."""
    _say(run, f"preempted  {run.saved} is complete; the same command with --resume auto goes on")


def _found(command: str, *otherwise: str) -> list[str]:
    """A command as the user can type it: by its name only where that means this environment."""
    path = shutil.which(command)
    if path is not None and Path(path).parent == Path(sys.executable).parent:
        return [command]
    here = os.path.relpath(sys.executable)
    return [sys.executable if here.startswith("..") else here, *otherwise]


def _say(run: Run, text: str) -> None:
    """Print a line once, without tearing the progress bar."""
    if run.ranks.first:
        tqdm.write(text)


def _introduction(run: Run) -> Iterator[str]:
    options, ranks, corpus = run.options, run.ranks, run.corpus
    stored = "bfloat16" if options.pure_bf16 else "float32"
    yield f"model      {run.config.model_type}, {run.num_parameters:,} parameters in {stored}"
    yield (
        f"parallel   {run.engine.layout}, world size {ranks.size}, on {ranks.device.type} "
        f"({torch.get_num_threads()} threads each), computing in {options.dtype}"
    )
    yield (
        f"text       {corpus.source}: {corpus.files} files, {len(corpus.train):,} bytes to train "
        f"on, {len(corpus.held_out):,} held out"
    )
    yield (
        f"steps      {options.steps} of {options.batch_size} x {options.context} bytes, "
        f"writing to {run.out}"
    )
    yield from _average_lines(run)
    if run.source is None:
        if options.resume == "auto":
            yield f"resume     no complete checkpoint in {run.out}: starting from scratch"
        return
    yield f"resume     from {run.source.path} at step {run.source.step}"
    for change in run.changes:
        yield f"  changed  {change}"
    if run.ema is not None and not run.source.has_average:
        yield "warning    the checkpoint has no average: a new one starts from its weights"
    if run.ema is None and run.source.has_average:
        yield "resume     the checkpoint's average is left aside, as --ema is not given"


def _average_lines(run: Run) -> Iterator[str]:
    """What is averaged, how far back, and what that costs each rank."""
    options, ema = run.options, run.ema
    shadows = run.ranks.gather(ema.memory["shadow"] if ema else 0)
    if ema is None:
        yield "average    none (--ema keeps one)"
        return
    every, start = options.ema_update_every, options.ema_start_step
    cadence = f"every {every} steps" if every > 1 else "after every step"
    yield f"average    {len(ema.names)} parameter tensors, {cadence}, from step {start} on"
    last = max(1, options.steps - start)
    for name, schedule in options.profiles.items():
        yield f"  {name:<8} {_schedule_text(schedule)}: {_decay_text(schedule, last)}"
    parts = ", ".join(f"rank {rank} {size:,}" for rank, size in enumerate(shadows))
    yield f"shadow     bytes: {parts}"


def _schedule_text(schedule: Schedule) -> str:
    settings = schedule.to_dict()
    kind = settings.pop("type", type(schedule).__name__)
    inner = ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    return f"{kind}({inner})"


def _decay_text(schedule: Schedule, last: int) -> str:
    first_decay, last_decay = schedule.decay(1), schedule.decay(last)
    if first_decay == last_decay:
        return f"decay {first_decay:.6g}, horizon {horizon(first_decay):.4g} steps"
    return (
        f"decay {first_decay:.6g} at first and {last_decay:.6g} at step {last}, "
        f"where its horizon is {horizon(last_decay):.4g} steps"
    )
