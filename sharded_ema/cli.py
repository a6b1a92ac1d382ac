"""The ``sharded-ema`` command.

Exit codes: 0 good, 1 a check failed, 2 wrong use or unreadable, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.errors import CheckpointCorruptError, EMAError
from sharded_ema.tools.average import average
from sharded_ema.tools.casting import DTYPES
from sharded_ema.tools.consolidate import FORMATS, consolidate
from sharded_ema.tools.diff import diff
from sharded_ema.tools.inspection import inspect
from sharded_ema.tools.report import Report
from sharded_ema.tools.synthesize import synthesize
from sharded_ema.tools.verify import verify
from sharded_ema.tools.watch import watch
from sharded_ema.version import __version__


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="sharded-ema",
        description="Tools for sharded checkpoints of averaged weights. They need no GPU, no "
        "torchrun and no PyTorch.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    look = commands.add_parser("inspect", help="say what is in a checkpoint")
    look.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="checkpoint, directory of a run, model directory or safetensors file",
    )
    look.add_argument("--tensors", action="store_true", help="list every tensor")
    look.add_argument("--json", action="store_true", help="print the report as JSON")

    check = commands.add_parser(
        "verify", help="check every byte of a checkpoint, and that its averages are averages"
    )
    check.add_argument("checkpoint", metavar="CKPT", help="directory of a checkpoint")
    check.add_argument(
        "--model",
        metavar="DIR",
        help="raw weights to compare with: a Hugging Face directory, a safetensors file or a DCP "
        "checkpoint",
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")

    merge = commands.add_parser(
        "consolidate", help="write one average as a model that from_pretrained loads"
    )
    merge.add_argument("src", metavar="SRC", help="directory of a checkpoint")
    merge.add_argument("dst", metavar="DST", help="directory to create")
    merge.add_argument("--profile", default=DEFAULT_PROFILE, help="(default: %(default)s)")
    merge.add_argument("--dtype", choices=DTYPES, help="of floating tensors (default: as stored)")
    merge.add_argument("--max-shard-size", default="5GB", help="per file (default: %(default)s)")
    merge.add_argument(
        "--prefix",
        help="key prefix of the average inside a larger checkpoint, or of tensors that other "
        "software has stored ('' for all)",
    )
    merge.add_argument(
        "--like",
        metavar="DIR",
        help="model or PEFT adapter directory to take configuration from "
        "and, if it has weights, to check names and shapes against",
    )
    merge.add_argument("--adapter", help="PEFT adapter to write, if the model had several")
    for flag, metavar, text in (
        ("--include", "PATTERN", "only tensors whose names in the output fit; may be repeated"),
        ("--exclude", "PATTERN", "no tensors whose names in the output fit; may be repeated"),
        ("--rename", "s/A/B/", "substitution in the names, as in Python's re; may be repeated"),
    ):
        merge.add_argument(flag, action="append", default=[], metavar=metavar, help=text)
    merge.add_argument(
        "--base", metavar="DIR", help="model directory to take what is not stored from"
    )
    merge.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="torch: one pytorch_model.bin; dcp: a checkpoint of torch.distributed.checkpoint; "
        "both need PyTorch (default: %(default)s)",
    )
    merge.add_argument("--plan", action="store_true", help="only say what would be written")
    merge.add_argument("--jobs", type=int, default=1, help="files at a time (default: %(default)s)")
    merge.add_argument(
        "--tied",
        choices=("drop", "emit"),
        default="drop",
        help="tied weights under one name, or under all (default: %(default)s)",
    )
    merge.add_argument("--no-progress", action="store_true", help="no progress bar")
    merge.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_diff(commands)
    _add_watch(commands)
    _add_synthesize(commands)
    _add_average(commands)
    return parser


def _add_diff(commands: Any) -> None:
    compare = commands.add_parser("diff", help="say how far apart two sets of weights are")
    side = "checkpoint, Hugging Face directory, safetensors file or DCP checkpoint"
    compare.add_argument("a", metavar="A", help=side)
    compare.add_argument("b", metavar="B", help=side)
    compare.add_argument(
        "--profile", default=DEFAULT_PROFILE, help="average of a checkpoint (default: %(default)s)"
    )
    compare.add_argument("--prefix", help="key prefix of the average if a checkpoint holds several")
    compare.add_argument("--tensors", action="store_true", help="list every tensor")
    compare.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="R",
        help="relative distance that any tensor may have (default: all bits equal)",
    )
    compare.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_watch(commands: Any) -> None:
    follow = commands.add_parser(
        "watch", help="consolidate each new checkpoint of a run, for an evaluator or a server"
    )
    follow.add_argument("run", metavar="RUN", help="directory of checkpoints; may be missing yet")
    follow.add_argument("--out", required=True, metavar="DIR", help="directory for the exports")
    follow.add_argument("--profile", default=DEFAULT_PROFILE, help="(default: %(default)s)")
    follow.add_argument("--dtype", choices=DTYPES, help="of floating tensors (default: as stored)")
    follow.add_argument("--like", metavar="DIR", help="as for consolidate")
    follow.add_argument("--keep", type=int, default=2, help="exports (default: %(default)s)")
    follow.add_argument(
        "--interval", type=float, default=10.0, metavar="S", help="seconds (default: %(default)g)"
    )
    follow.add_argument("--once", action="store_true", help="export what is missing, and end")
    follow.add_argument("--json", action="store_true", help="print a line of JSON for each export")


def _add_synthesize(commands: Any) -> None:
    build = commands.add_parser(
        "synthesize", help="build averages of any length out of the power-function ones of a run"
    )
    build.add_argument("run", metavar="RUN", help="directory with the checkpoints of a run")
    build.add_argument(
        "--sigma-rel",
        type=_numbers,
        required=True,
        metavar="S,...",
        help="relative widths, such as 0.05,0.10,0.15",
    )
    build.add_argument("--step", type=int, help="checkpoint to end at (default: the last)")
    build.add_argument(
        "--profiles",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="stored averages to use (default: all power functions)",
    )
    build.add_argument(
        "--max-residual",
        type=float,
        default=0.05,
        help="refuse what is missed by more than this share (default: %(default)s)",
    )
    _add_writing(build, stored="as stored")


def _add_average(commands: Any) -> None:
    mean = commands.add_parser(
        "average", help="write the mean of several checkpoints or models, uniform or weighted"
    )
    mean.add_argument(
        "checkpoints",
        metavar="CKPT",
        nargs="+",
        help="checkpoint, Hugging Face directory, safetensors file or DCP checkpoint",
    )
    mean.add_argument("--weights", type=_numbers, metavar="W,...", help="such as 1,2,1")
    mean.add_argument(
        "--profile", default=DEFAULT_PROFILE, help="of our checkpoints (default: %(default)s)"
    )
    mean.add_argument("--prefix", help="key prefix of the average or model in a larger checkpoint")
    _add_writing(mean, stored="that of the last input")


def _add_writing(parser: argparse.ArgumentParser, *, stored: str) -> None:
    """The flags of commands that write models made of several checkpoints."""
    parser.add_argument("--out", metavar="DIR", required=True, help="directory to create")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of floating tensors (default: {stored})")
    parser.add_argument("--max-shard-size", default="5GB", help="per file (default: %(default)s)")
    parser.add_argument(
        "--like",
        metavar="DIR",
        help="model directory to take configuration from and, if it has weights, to check names "
        "and shapes against",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="files at a time (default: %(default)s)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between, got {text!r}") from None


def run(arguments: argparse.Namespace) -> Report:
    """Call the tool that the command names."""
    if arguments.command == "inspect":
        return inspect(arguments.checkpoint, tensors=arguments.tensors)
    if arguments.command == "verify":
        return verify(arguments.checkpoint, model=arguments.model)
    if arguments.command == "diff":
        return diff(
            arguments.a,
            arguments.b,
            profile=arguments.profile,
            prefix=arguments.prefix,
            tensors=arguments.tensors,
            tolerance=arguments.tolerance,
        )
    if arguments.command == "synthesize":
        return synthesize(
            arguments.run,
            sigma_rel=arguments.sigma_rel,
            step=arguments.step,
            profiles=arguments.profiles,
            max_residual=arguments.max_residual,
            **_writing(arguments),
        )
    if arguments.command == "average":
        return average(
            arguments.checkpoints,
            weights=arguments.weights,
            profile=arguments.profile,
            prefix=arguments.prefix,
            **_writing(arguments),
        )
    return consolidate(
        arguments.src,
        arguments.dst,
        profile=arguments.profile,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        prefix=arguments.prefix,
        like=arguments.like,
        jobs=arguments.jobs,
        tied=arguments.tied,
        adapter=arguments.adapter,
        include=arguments.include,
        exclude=arguments.exclude,
        rename=arguments.rename,
        base=arguments.base,
        format=arguments.format,
        plan=arguments.plan,
        progress=not arguments.no_progress,
    )


def _writing(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("out", "dtype", "max_shard_size", "like", "jobs")
    return {name: getattr(arguments, name) for name in names} | {
        "progress": not arguments.no_progress
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; see the module for exit codes."""
    arguments = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may hold what the terminal does not write
            stream.reconfigure(errors="backslashreplace")
    try:
        if arguments.command == "watch":
            return _watch(arguments)
        report = run(arguments)
        if arguments.json:
            _say(json.dumps(report.to_dict(), indent=1))
        else:
            _say(_printable(report.text()))
    except KeyboardInterrupt:
        goes_on = arguments.command == "consolidate"
        print(
            "sharded-ema: interrupted" + goes_on * "; the same command goes on where this one was",
            file=sys.stderr,
        )
        return 130
    except (EMAError, OSError) as error:
        print(_printable(f"sharded-ema: error: {error}"), file=sys.stderr)
        return 1 if isinstance(error, CheckpointCorruptError) else 2
    return 0 if report.ok else 1


def _say(text: str) -> bool:
    """Print at once; whether anybody still reads.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # The interpreter would write once more what is left, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # which is head, or a pager that was left
            raise
        return False
    return True


def _watch(arguments: argparse.Namespace) -> int:
    """Print a line for each report, until SIGTERM or SIGINT, which abandon an export under way."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    ok = True
    try:
        reports = watch(
            arguments.run,
            arguments.out,
            dtype=arguments.dtype,
            profile=arguments.profile,
            like=arguments.like,
            keep=arguments.keep,
            interval=arguments.interval,
            once=arguments.once,
        )
        with closing(reports):
            for report in reports:
                ok &= report.ok
                if not _say(json.dumps(report.to_dict()) if arguments.json else _line(report)):
                    break
    except KeyboardInterrupt:
        return 1 if arguments.once else 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0 if ok else 1


def _line(report: Report) -> str:
    facts, said = report.facts, [*report.notes, *(f"FAILED: {p}" for p in report.problems)]
    if report.ok and "output" in facts:
        size = f"step {facts['step']}, {facts['bytes']:,} bytes in {facts['seconds']:.3g} s"
        said.insert(0, f"exported to {facts['output']} ({size})")
    return _printable(f"{report.path}: {'; '.join(said)}").replace("\n", " ")


def _printable(text: str) -> str:
    """Names from a checkpoint may hold what a terminal takes for commands."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
