"""Runs side by side: the held-out loss of the weights and of the averages at the end of each.

``python compare_runs.py RUN RUN...`` reads what ``train.py`` wrote, prints a table, says which
weights are best and draws the curves into ``compare.png`` of the first run.
Exit code: 0, or 2 for wrong use or unreadable input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.plotting import plot_runs
from training.ranks import RunError
from training.recording import Row, read_rows
from training.summary import Summary, read_summary

RAW = "raw weights"
# Within a run, in nats: less is called no change. Between runs far more means nothing: other seeds
# of the demo lie up to 0.07 apart.
ALIKE = 0.005


def main(argv: Sequence[str] | None = None) -> int:
    """Print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output directories")
    args = parser.parse_args(argv)
    try:
        compare(args.runs)
    except (RunError, OSError) as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(runs: Sequence[Path]) -> None:
    """The comparison itself.

    Raises:
        RunError: a run has not ended, or they were measured on other text or in other tokens.
    """
    summaries = {run: read_summary(run) for run in runs}
    losses = {run: _losses(run, summary) for run, summary in summaries.items()}
    measured = [summary.evaluation for summary in summaries.values()]
    if len({(e.text, e.vocab_size, e.context, e.sequences) for e in measured}) > 1:
        raise RunError(
            "the runs were evaluated on different text, or in other tokens: losses do not compare"
        )
    width = max(len(str(run)) for run in runs)
    for run, found in losses.items():
        columns = "   ".join(f"{name} {loss:.4f}" for name, loss in found.items())
        print(f"{run!s:<{width}}   {columns}   {_verdict(found)}")
    everywhere = {
        (run, name): loss for run, found in losses.items() for name, loss in found.items()
    }
    best = min(everywhere, key=lambda key: everywhere[key])
    print(f"lowest: {best[1]} of {best[0]}, {everywhere[best]:.4f} nats per token")
    picture = runs[0] / "compare.png"
    plot_runs({str(run): _rows(run) for run in runs}, picture)
    print(f"curves: {picture}")


def _rows(run: Path) -> list[Row]:
    rows = read_rows(run / "metrics.jsonl")
    if not rows:
        raise RunError(f"{run} has no metrics.jsonl with the losses on its way")
    return rows


def _losses(run: Path, summary: Summary) -> dict[str, float]:
    """By name; the weights come first."""
    if summary.raw_loss is None:
        raise RunError(f"{run} reports no held-out loss of its weights")
    averages = {
        f"average {name!r}": loss for name, loss in summary.ema_loss.items() if loss is not None
    }
    return {RAW: summary.raw_loss} | averages


def _verdict(losses: dict[str, float]) -> str:
    """What the averages of one run were good for."""
    averages = [loss for name, loss in losses.items() if name != RAW]
    if not averages:
        return ""
    gain = losses[RAW] - min(averages)
    if abs(gain) < ALIKE:
        return f"the average changes nothing here (by {gain:+.4f})"
    return f"the average is {'better' if gain > 0 else 'WORSE'} by {abs(gain):.4f}"


if __name__ == "__main__":
    sys.exit(main())
