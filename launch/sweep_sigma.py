"""Held-out loss against the width of the average, from the snapshots of one run.

``python sweep_sigma.py RUN`` takes a run of ``train.py`` that kept two power-function averages and
many checkpoints (``--ema-profile a=power:0.05 --ema-profile b=power:0.10 --keep-last 20``), builds
averages of all widths with ``synthesize``, and draws the loss of each.
Exit code: 0 all went well, 1 a width cannot be expressed, 2 wrong use or unreadable input.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM

from sharded_ema import EMAError, synthesize
from training.evaluation import loss_of_export
from training.plotting import plot_sweep
from training.ranks import RunError
from training.summary import read_summary
from training.tokenizer import load_tokenizer

WIDTHS = [0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20, 0.22]


def main(argv: Sequence[str] | None = None) -> int:
    """Build, evaluate, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="output directory of the training run")
    parser.add_argument(
        "--sigma-rel",
        type=lambda text: [float(item) for item in text.split(",")],
        default=WIDTHS,
        metavar="S,...",
        help="widths (default: 0.03 to 0.22)",
    )
    parser.add_argument("--max-residual", type=float, default=0.05, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="directory to create (default: RUN/sweep)")
    parser.add_argument("--picture", type=Path, help="(default: OUT/sigma_rel.png)")
    args = parser.parse_args(argv)
    try:
        return sweep(args)
    except (RunError, EMAError, OSError) as error:
        print(f"sweep_sigma.py: error: {error}", file=sys.stderr)
        return 2


def sweep(args: argparse.Namespace) -> int:
    """The sweep itself; its exit code."""
    summary = read_summary(args.run)
    if summary.raw_loss is None:
        raise RunError(f"{args.run} reports no held-out loss of its weights")
    out = args.out or args.run / "sweep"
    report = synthesize(
        args.run,
        sigma_rel=args.sigma_rel,
        out=out,
        like=args.run / "hf",
        max_residual=args.max_residual,
    )
    print(report.text())
    if not report.ok:
        return 1
    windows = summary.evaluation.windows(load_tokenizer(args.run / "hf"))
    rows = []
    for width in sorted(args.sigma_rel):
        said = report.facts["widths"][str(width)]
        model = AutoModelForCausalLM.from_pretrained(out / said["output"], local_files_only=True)
        loss = loss_of_export(model, windows)
        rows.append({"sigma_rel": width, "loss": loss, "residual": said["residual"]})
        print(f"sigma_rel {width:<6} loss {loss:.4f}  residual {said['residual']:.2e}")
    with (out / "sigma_rel.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    losses = {name: loss for name, loss in summary.ema_loss.items() if loss is not None}
    tracked = {
        float(schedule["sigma_rel"]): losses[name]
        for name, schedule in report.facts["profiles"].items()
        if schedule["sigma_rel"] and name in losses and summary.step == report.facts["step"]
    }
    picture = args.picture or out / "sigma_rel.png"
    title = (
        f"{len(rows)} averages of one run, from {len(report.facts['snapshots'])} snapshots, "
        f"at step {report.facts['step']}"
    )
    plot_sweep(rows, tracked, summary.raw_loss, title, picture)
    print(f"table      {out / 'sigma_rel.csv'}")
    print(f"curve      {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
