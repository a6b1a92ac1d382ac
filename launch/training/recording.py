"""What a run writes down while it goes: metrics.jsonl, metrics.csv and TensorBoard."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

Row = dict[str, Any]


class Recorder:
    """Appends rows of metrics; used on rank 0 only.

    The JSON lines are the record; the table is the same rows with all columns that occur.
    """

    def __init__(self, out: Path, start_step: int) -> None:
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
