"""The picture of a run: held-out loss of the raw and of the averaged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a node without a display
from matplotlib import pyplot

from training.recording import Row, series

COLOURS = ("#d1495b", "#00798c", "#edae49", "#6a4c93", "#66a182")


def plot_losses(rows: Sequence[Row], profiles: Sequence[str], title: str, path: Path) -> None:
    """Draw loss over optimizer steps from the recorded rows into ``path``."""
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    axes.plot(*series(rows, "train_loss"), color="0.8", linewidth=1, label="training batches")
    steps, raw = series(rows, "raw_loss")
    axes.plot(steps, raw, color="0.2", linewidth=1.6, label="held out, raw weights")
    shown = list(raw)
    for name, colour in zip(profiles, COLOURS * len(profiles), strict=False):
        steps, losses = series(rows, f"ema_loss/{name}")
        axes.plot(steps, losses, color=colour, linewidth=1.6, label=f"held out, average {name!r}")
        shown += losses
    if shown:
        # The first evaluations are far above the rest and would flatten what is to be compared.
        ordered = sorted(shown)
        top = ordered[int(0.85 * (len(ordered) - 1))]
        margin = 0.1 * (top - ordered[0]) + 0.02
        axes.set_ylim(ordered[0] - margin, top + 4 * margin)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    _finish(figure, axes, title, path)


def plot_runs(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the held-out losses of several runs, weights and averages, into ``path``.

    Args:
        runs: the metrics of each, by name.
    """
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    ends = []
    for (name, rows), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        averages = [key for key in rows[-1] if key.startswith("ema_loss/")]
        for key in ["raw_loss", *averages]:
            steps, losses = series(rows, key)
            style, what = ("-", key[9:]) if key in averages else ("--", "raw weights")
            axes.plot(steps, losses, style, color=colour, linewidth=1.6, label=f"{name}: {what}")
            ends += losses[len(losses) // 4 :]
    margin = 0.1 * (max(ends) - min(ends)) + 0.02
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out loss (nats per token)")
    _finish(figure, axes, "Averaging and annealing", path)


def plot_sweep(
    rows: Sequence[Row], tracked: dict[float, float], raw: float, title: str, path: Path
) -> None:
    """Draw held-out loss over the width of synthesised averages into ``path``.

    Args:
        rows: with ``sigma_rel`` and ``loss``, by width.
        tracked: loss of the averages that training itself kept, by width.
        raw: loss of the weights.
    """
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    axes.plot(
        [row["sigma_rel"] for row in rows],
        [row["loss"] for row in rows],
        marker="o",
        color=COLOURS[1],
        label="synthesised afterwards",
    )
    axes.plot(
        list(tracked),
        list(tracked.values()),
        linestyle="none",
        marker="s",
        markersize=10,
        markerfacecolor="none",
        color=COLOURS[0],
        label="tracked in training",
    )
    axes.axhline(raw, color="0.4", linestyle="--", linewidth=1, label="raw weights")
    axes.set_xlabel("relative width of the average, sigma_rel")
    axes.set_ylabel("held-out loss (nats per token)")
    _finish(figure, axes, title, path)


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
