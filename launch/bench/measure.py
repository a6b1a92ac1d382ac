"""Interleaved timing of rows that are compared with one another, and the table they end up in.

On a shared machine only ratios within one run mean anything: every round times every row once, in
turn, so that what slows the machine down for a while slows all of them, and medians are compared.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    *("date", "git sha", "torch", "python", "cpu", "device", "threads"),
    *("case", "row", "median_ms", "ratio_to_baseline", "ratio_to_limit"),
)


def nothing() -> None:
    """What has to be done before or after a row that needs nothing."""


@dataclass(frozen=True)
class Row:
    """One thing to time.

    Attributes:
        name: of the row; unique in its case.
        call: what is timed.
        baseline: name of the row to divide by: the other way to do the same.
        limit: name of the row that moves as many bytes and does nothing else.
        before: done before every call, untimed.
    """

    name: str
    call: Callable[[], object]
    baseline: str | None = None
    limit: str | None = None
    before: Callable[[], object] = nothing


def medians(
    rows: Sequence[Row], rounds: int, *, warm: bool = True, wait: Callable[[], object] = nothing
) -> dict[str, float]:
    """Median seconds of each row over ``rounds``, after one that does not count.

    The first round imports what is imported late and touches memory for the first time, which in a
    virtual machine can take longer than the work itself.

    Args:
        warm: call once untimed before every timed call, so that a row finds its own tensors in
            the cache as far as they fit, and not those of the row before it.
        wait: called at the start and at the end of what is timed, such as the wait for a GPU.
    """
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(1 + rounds):
        for row in rows:
            if warm:
                row.before()
                row.call()
            row.before()
            wait()
            start = time.perf_counter()
            row.call()
            wait()
            times[row.name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


class Report:
    """The results so far: printed as they come, appended to a CSV file at the end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.lines: list[dict[str, str]] = []
        self._machine = machine()

    def add(self, case: str, rows: Sequence[Row], seconds: dict[str, float]) -> None:
        """Print one case as a table and remember it."""
        width = max(len(row.name) for row in rows)
        print(f"\n{case}, {self.device}, {torch.get_num_threads()} threads")
        print(f"  {'':<{width}}  {'median ms':>10}  {'/ limit':>7}  {'/ baseline':>10}")
        for row in rows:
            taken = seconds[row.name]
            of_limit = _ratio(taken, seconds, row.limit)
            of_baseline = _ratio(taken, seconds, row.baseline)
            beside = f"  ({row.baseline})" if row.baseline else ""
            print(
                f"  {row.name:<{width}}  {taken * 1e3:>10.3f}  {of_limit:>7}  "
                f"{of_baseline:>10}{beside}"
            )
            self.lines.append(
                {
                    **self._machine,
                    "device": self.device,
                    "threads": str(torch.get_num_threads()),
                    "case": case,
                    "row": row.name,
                    "median_ms": f"{taken * 1e3:.4f}",
                    "ratio_to_baseline": of_baseline,
                    "ratio_to_limit": of_limit,
                }
            )

    def append_to(self, path: Path) -> None:
        """Append all rows to the CSV file, which is made if it is not there."""
        append_rows(path, COLUMNS, self.lines)


def _ratio(taken: float, seconds: dict[str, float], other: str | None) -> str:
    return "" if other is None else f"{taken / seconds[other]:.3f}"


def append_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Append rows to a table of results, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    print(f"\nappended {len(rows)} rows to {path}")


def machine() -> dict[str, str]:
    """What was measured, and on what."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "git sha": _git_sha(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
    }


def _git_sha() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return "unknown"
    return done.stdout.strip()


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name} x {cores}"
