"""How near averages that were synthesised come to ones that were tracked, by number of snapshots.

``python launch/bench/posthoc.py``. A small network learns from noisy data in one process. Two
averages, of sigma_rel 0.05 and 0.10, are what ``synthesize`` may use; the others are tracked to
compare with.
Errors are norms over all parameters: of the difference to the tracked average, over the norm of the
difference between the tracked average and the raw weights, which is what averaging does.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from measure import ROOT, machine
from sharded_ema import Power, ShardedEMA, synthesize

STORED = (0.05, 0.10)
WIDTHS = (0.03, 0.04, 0.05, 0.06, 0.07, 0.085, 0.10, 0.12, 0.15, 0.20, 0.25)
STEPS = 1024
SNAPSHOTS = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = (
    *("date", "git sha", "torch", "steps", "snapshots", "sigma_rel"),
    *("residual", "gain", "error", "error_of_nearest_stored"),
)

Weights = dict[str, np.ndarray]


def name_of(width: float) -> str:
    """Of a profile; a dot cannot stand in it."""
    return f"p{round(width * 1000):03d}"


def train(folder: Path) -> tuple[Weights, dict[float, Weights]]:
    """Run to the end with snapshots on the way; raw weights and all averages."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(),
                          nn.Linear(128, 1))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ema = ShardedEMA(model, {name_of(width): Power(sigma_rel=width) for width in WIDTHS})
    ema.attach(optimizer)
    truth = torch.randn(32)
    for step in range(1, STEPS + 1):
        data = torch.randn(64, 32)
        noisy = torch.sin(data @ truth) + torch.randn(64)
        (model(data).squeeze(1) - noisy).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (STEPS // max(SNAPSHOTS)) == 0:
            ema.save(folder / f"step_{step}", step=step, latest=False)
    averages: dict[float, Weights] = {}
    for width in WIDTHS:
        with ema.swap(name_of(width)):
            averages[width] = {k: t.numpy().copy() for k, t in model.state_dict().items()}
    ema.close()
    return {k: t.numpy() for k, t in model.state_dict().items()}, averages


def distance(left: Weights, right: Weights) -> float:
    """Norm of the difference of two models in float64."""
    return float(np.sqrt(sum(np.square(left[k].astype("f8") - right[k]).sum() for k in right)))


def compare(
    every: Path, count: int, raw: Weights, averages: dict[float, Weights]
) -> list[dict[str, object]]:
    """Synthesise all widths from ``count`` snapshots; a row for each."""
    with tempfile.TemporaryDirectory() as scratch:
        run, out = Path(scratch, "run"), Path(scratch, "out")
        run.mkdir()
        for number in range(1, count + 1):
            step = f"step_{STEPS * number // count}"
            (run / step).symlink_to(every / step)
        report = synthesize(
            run,
            sigma_rel=WIDTHS,
            out=out,
            profiles=[name_of(width) for width in STORED],
            max_residual=10,
            progress=False,
        )
        rows = []
        for width in WIDTHS:
            said = report.facts["widths"][str(width)]
            found = load_file(out / said["output"] / "model.safetensors")
            effect = distance(averages[width], raw)
            nearest = min(distance(averages[s], averages[width]) for s in STORED)
            rows.append(
                {
                    "snapshots": count,
                    "sigma_rel": width,
                    "residual": f"{said['residual']:.2e}",
                    "gain": f"{said['gain']:.2f}",
                    "error": f"{distance(found, averages[width]) / effect:.2e}",
                    "error_of_nearest_stored": f"{nearest / effect:.2e}",
                }
            )
        return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--csv",
        type=Path,
        default=ROOT / "docs" / "benchmarks" / "posthoc.csv",
        help="table to write (default: docs/benchmarks/posthoc.csv)",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    said = {name: value for name, value in machine().items() if name in COLUMNS}
    with tempfile.TemporaryDirectory() as scratch:
        raw, averages = train(Path(scratch))
        rows = [row for n in SNAPSHOTS for row in compare(Path(scratch), n, raw, averages)]
    with args.csv.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({**said, "steps": STEPS, **row})
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"wrote {len(rows)} rows to {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
