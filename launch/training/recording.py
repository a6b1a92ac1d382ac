"""The metrics of a run: measured step by step, written to metrics.jsonl, .csv and TensorBoard."""

from __future__ import annotations

import csv
import json
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from training.ranks import Ranks, RunError

Row = dict[str, Any]


class Meter:
    """Loss and speed of the steps since the last row; on every rank."""

    def __init__(self, ranks: Ranks, step: int, tokens_per_step: int) -> None:
        self._ranks = ranks
        self._tokens_per_step = tokens_per_step
        self._losses: list[torch.Tensor] = []
        self._step = step
        self._started = time.monotonic()

    def add(self, loss: torch.Tensor) -> None:
        """Note this rank's part of the loss of one step; nothing is exchanged."""
        self._losses.append(loss)

    def row(self, step: int, rate: float) -> Row:
        """What was noted since the last row, and begin anew: one exchange for all those steps.

        Args:
            step: the last one.
            rate: its learning rate.

        Raises:
            RunError: the loss is not finite.
        """
        loss = float(self._ranks.sum(torch.stack(self._losses).mean()))
        if not math.isfinite(loss):
            raise RunError(f"the training loss is {loss} at step {step}")
        now = time.monotonic()
        speed = (step - self._step) * self._tokens_per_step / (now - self._started)
        self._losses.clear()
        self._step, self._started = step, now
        return {
            "step": step,
            "train_loss": loss,
            "lr": rate,
            "tokens_per_second": speed,
            "peak_memory": peak_memory(self._ranks.device),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of what is no training does not count."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far: of its GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # which Linux counts in KiB


class Recorder:
    """Appends rows of metrics; used on rank 0 only.

    The JSON lines are the record; the table is the same rows with all columns that occur.
    """

    def __init__(self, out: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a while; here on one rank alone

        self._lines = out / "metrics.jsonl"
        self._table = out / "metrics.csv"
        # Rows after the checkpoint belong to steps that are about to be made again.
        self.rows = [row for row in read_rows(self._lines) if row["step"] <= start_step]
        self._lines.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self._columns: list[str] = []
        self._write_table()
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)

    def add(self, row: Row) -> None:
        """Write one row; it must have ``step``."""
        # JSON has no NaN: what is not a number is absent.
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        self.rows.append(row)
        with self._lines.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        if set(row) <= set(self._columns):
            with self._table.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(row)
        else:
            self._write_table()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush TensorBoard's queue."""
        self._board.close()

    def _write_table(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row)) or ["step"]
        with self._table.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a metrics.jsonl; a process that was killed may leave half a line."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was measured."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in pairs], [value for _, value in pairs]
