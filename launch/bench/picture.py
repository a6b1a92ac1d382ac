"""Draws docs/benchmarks/update.png from the last rows of docs/benchmarks/update.csv.

``python launch/bench/picture.py``, after ``launch/bench/update.py``. Each bar is the time of an
update over that of a stream of the bytes that have to be moved, in one run.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a node without a display
from matplotlib import pyplot
from matplotlib.axes import Axes

from measure import ROOT
from update import CALLED, SIZES

FOLDER = ROOT / "docs" / "benchmarks"
THREADS = ("1", "2")
COLOURS = {"ours": ("#00798c", "#66afba"), "others": ("#8d99a6", "#c3cad1")}
STREAM = "stream of the same bytes"
#: What is drawn by the row of its limit: a row by its label.
CALLS = {
    'call: ShardedEMA.update(), "skip"': "sharded-ema (default)",
    'call: ShardedEMA.update(), "allow"': "sharded-ema, no guard",
    "call: torch._foreach_lerp_": "bare torch._foreach_lerp_",
    **{f"call: {what}": what for what in CALLED.values()},
}
KERNELS = {
    "update, guard on": ("sharded-ema, fp32", STREAM),
    "torch._foreach_lerp_": ("bare torch._foreach_lerp_, fp32", STREAM),
    "bf16: update, guard on": ("sharded-ema, bf16", "bf16: stream of the same bytes"),
    "bf16: loop of e.lerp_(p.float(), w)": ("loop, bf16", "bf16: stream of the same bytes"),
    "update of K=3 averages, guard on": ("sharded-ema, K = 3", "stream of the bytes of K=3"),
}
#: Milliseconds by threads, case and row.
Times = Mapping[tuple[str, str, str], float]


def last_times(path: Path) -> Times:
    """What the last commit that was measured took on the CPU, with any number of threads.

    Raises:
        LookupError: there is no run on the CPU.
    """
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["device"] == "cpu"]
    # The rows that a first run has appended make the tree of the second one dirty.
    commits = [row["git sha"].removesuffix("-dirty") for row in rows]
    found = {
        (row["threads"], row["case"], row["row"]): float(row["median_ms"])
        for row, commit in zip(rows, commits, strict=True)
        if commit == commits[-1]
    }
    if not found:
        raise LookupError(f"{path} has no rows of the CPU; run launch/bench/update.py first")
    return found


def draw(axes: Axes, times: Times, case: str, what: Mapping[str, tuple[str, str]]) -> None:
    """Bars of one case, those of one thread above those of two.

    Args:
        what: the label of a row, and the row that it is divided by.
    """
    shown = [row for row in what if any((t, case, row) in times for t in THREADS)]
    for number, threads in enumerate(THREADS):
        places, ratios, colours = [], [], []
        for place, row in enumerate(shown):
            limit = times.get((threads, case, what[row][1]))
            taken = times.get((threads, case, row))
            if taken is not None and limit is not None:
                places.append(place + 0.4 * number - 0.2)
                ratios.append(taken / limit)
                mine = what[row][0].startswith("sharded-ema")
                colours.append(COLOURS["ours" if mine else "others"][number])
        bars = axes.barh(places, ratios, height=0.38, color=colours)
        axes.bar_label(bars, [f"{r:.2f}" for r in ratios], padding=2, fontsize=7)
    axes.set_yticks(range(len(shown)), [what[row][0] for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#d1495b", linewidth=1)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--csv", type=Path, default=FOLDER / "update.csv")
    parser.add_argument("--picture", type=Path, default=FOLDER / "update.png")
    args = parser.parse_args(argv)
    times = last_times(args.csv)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), dpi=150, layout="constrained")
    _, mixed, big = SIZES
    draw(axes[0], times, mixed, {row: (label, STREAM) for row, label in CALLS.items()})
    axes[0].set_title(f"as a training loop calls it, fp32\n{mixed}", fontsize=9)
    draw(axes[1], times, big, KERNELS)
    axes[1].set_title(f"without the calls around it\n{big}", fontsize=9)
    for each in axes:
        each.set_xlabel("time / a stream of the bytes (dark: 1 thread, light: 2)", fontsize=8)
    figure.savefig(args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
