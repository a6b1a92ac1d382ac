"""The ``sharded-ema`` command, and what it ends with (:data:`EXIT_CODES`)."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.errors import CheckpointCorruptError, ConfigError, EMAError
from sharded_ema.tools.advise import UNITS, advise
from sharded_ema.tools.average import average
from sharded_ema.tools.casting import DTYPES, parse_dtypes
from sharded_ema.tools.consolidate import FORMATS, consolidate
from sharded_ema.tools.diff import diff
from sharded_ema.tools.env import env
from sharded_ema.tools.inspection import inspect
from sharded_ema.tools.interruption import Interruption
from sharded_ema.tools.parts import Part
from sharded_ema.tools.report import Report, printable, size
from sharded_ema.tools.synthesize import synthesize
from sharded_ema.tools.verify import verify
from sharded_ema.tools.watch import watch
from sharded_ema.version import __version__


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a command.

    Attributes:
        name: ``"src"``, or of a flag ``"--dtype"``: that of the tool's parameter.
        settings: for ``add_argument``.
    """

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """A command: the function behind it, and its arguments in the order of the help.

    Attributes:
        tool: called with the arguments that are no flags in their order, and the flags by name.
        example: what one types after the name of the command.
    """

    tool: Callable[..., Any]
    help: str
    example: str
    arguments: tuple[Argument, ...]


def _argument(name: str, **settings: Any) -> Argument:
    return Argument(name, settings)


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between, got {text!r}") from None


def _profile(help: str = "average of the checkpoint") -> Argument:
    return _argument("--profile", default=DEFAULT_PROFILE, help=f"{help} (default: %(default)s)")


def _dtype_of_some(text: str) -> str:
    try:
        parse_dtypes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _dtype(stored: str = "as stored") -> Argument:
    return _argument(
        "--dtype",
        type=_dtype_of_some,
        action="append",
        metavar="[PATTERN=]DTYPE",
        help=f"of floating tensors, or of those whose names fit: {', '.join(DTYPES)}; may be "
        f"repeated (default: {stored})",
    )


def _repeated(name: str, metavar: str, help: str, default: str = "none") -> Argument:
    said = f"{help}; may be repeated (default: {default})"
    return _argument(name, action="append", default=[], metavar=metavar, help=said)


_TRUST_CODE = _argument(
    "--trust-code", action="store_true", help="with --like, copy Python files of the model as well"
)


def _writing(stored: str) -> tuple[Argument, ...]:
    """What the commands take that write models made of several checkpoints."""
    like = (
        "model directory to take configuration from and, if it has weights, to check names and "
        "shapes against (default: weights alone)"
    )
    return (
        _argument("--out", metavar="DIR", required=True, help="directory to create"),
        _dtype(stored),
        _SIZE,
        _argument("--like", metavar="DIR", help=like),
        _TRUST_CODE,
        _JOBS,
        _NO_PROGRESS,
    )


_TENSORS = _argument("--tensors", action="store_true", help="list every tensor")
_SIZE = _argument("--max-shard-size", default="5GB", help="per file (default: %(default)s)")
_JOBS = _argument("--jobs", type=int, default=1, help="files at a time (default: %(default)s)")
_NO_PROGRESS = _argument(
    "--no-progress", dest="progress", action="store_false", help="no progress bar"
)
_SIDE = "checkpoint, Hugging Face directory, safetensors or .pt file, or DCP checkpoint"

COMMANDS = {
    "inspect": Command(
        inspect,
        "say what is in a checkpoint",
        "run/step_1000",
        (
            _argument(
                "checkpoint",
                metavar="CKPT",
                help="checkpoint, directory of a run, model directory, safetensors or .pt file",
            ),
            _TENSORS,
        ),
    ),
    "verify": Command(
        verify,
        "check every byte of a checkpoint, and that its averages are averages",
        "run/step_1000",
        (
            _argument("checkpoint", metavar="CKPT", help="directory of a checkpoint, or an export"),
            _argument(
                "--model",
                metavar="DIR",
                help="raw weights to compare with: a Hugging Face directory, a safetensors file or "
                "a DCP checkpoint (default: none)",
            ),
        ),
    ),
    "consolidate": Command(
        consolidate,
        "write one average as a model that from_pretrained loads",
        "run/step_1000 export --dtype bfloat16",
        (
            _argument("src", metavar="SRC", help="directory of a checkpoint"),
            _argument("dst", metavar="DST", help="directory to create"),
            _profile(),
            _dtype(),
            _SIZE,
            _argument(
                "--prefix",
                help="key prefix of the average inside a larger checkpoint, or of tensors that "
                "other software has stored, '' for all (default: the only average there)",
            ),
            _argument(
                "--like",
                metavar="DIR",
                help="model or PEFT adapter directory to take configuration from and, if it has "
                "weights, to check names and shapes against (default: weights alone)",
            ),
            _TRUST_CODE,
            _argument(
                "--adapter", help="PEFT adapter to write, of several (default: the only one)"
            ),
            _repeated("--include", "PATTERN", "only tensors whose names in the output fit", "all"),
            _repeated("--exclude", "PATTERN", "no tensors whose names in the output fit"),
            _repeated("--rename", "s/A/B/", "substitution in the names, as in Python's re"),
            _argument(
                "--base",
                metavar="DIR",
                help="model directory, safetensors or .pt file to take what is not stored from "
                "(default: none)",
            ),
            _argument(
                "--format",
                choices=FORMATS,
                default=FORMATS[0],
                help="torch: one pytorch_model.bin; dcp: a checkpoint of torch.distributed."
                "checkpoint; both need PyTorch (default: %(default)s)",
            ),
            _argument("--plan", action="store_true", help="only say what would be written"),
            _argument(
                "--part",
                metavar="I/N",
                help="which of N processes this one is, from 0 on, that share the files of the "
                "output (default: as torchrun says, or the only one)",
            ),
            _JOBS,
            _argument(
                "--tied",
                choices=("drop", "emit"),
                help="tied weights under one name, or under all (default: all; with --like the "
                "names in its weights, or one if it has none)",
            ),
            _NO_PROGRESS,
        ),
    ),
    "diff": Command(
        diff,
        "say how far apart two sets of weights are",
        "run/step_1000 export --tolerance 0.004",
        (
            _argument("a", metavar="A", help=_SIDE),
            _argument("b", metavar="B", help=_SIDE),
            _profile("average of a checkpoint"),
            _argument(
                "--prefix",
                help="key prefix of the average if a checkpoint holds several (default: the only "
                "one)",
            ),
            _TENSORS,
            _argument(
                "--tolerance",
                type=float,
                default=0.0,
                metavar="R",
                help="relative distance that any tensor may have (default: all bits equal)",
            ),
        ),
    ),
    "watch": Command(
        watch,
        "consolidate each new checkpoint of a run, for an evaluator or a server",
        "run --out served",
        (
            _argument("run", metavar="RUN", help="directory of checkpoints; may be missing yet"),
            _argument("--out", required=True, metavar="DIR", help="directory for the exports"),
            _profile(),
            _dtype(),
            _argument("--like", metavar="DIR", help="as for consolidate (default: weights alone)"),
            _TRUST_CODE,
            _argument("--keep", type=int, default=2, help="exports (default: %(default)s)"),
            _argument(
                "--interval",
                type=float,
                default=10.0,
                metavar="S",
                help="seconds (default: %(default)g)",
            ),
            _argument("--once", action="store_true", help="export what is missing, and end"),
        ),
    ),
    "synthesize": Command(
        synthesize,
        "build averages of any length out of the power-function ones of a run",
        "run --sigma-rel 0.05,0.10 --out sweep",
        (
            _argument("run", metavar="RUN", help="directory with the checkpoints of a run"),
            _argument(
                "--sigma-rel",
                type=_numbers,
                required=True,
                metavar="S,...",
                help="relative widths, such as 0.05,0.10,0.15",
            ),
            _argument("--step", type=int, help="checkpoint to end at (default: the last)"),
            _argument(
                "--profiles",
                type=lambda text: text.split(","),
                metavar="NAME,...",
                help="stored averages to use (default: all power functions)",
            ),
            _argument(
                "--max-residual",
                type=float,
                default=0.05,
                help="refuse what is missed by more than this share (default: %(default)s)",
            ),
            *_writing("as stored"),
        ),
    ),
    "average": Command(
        average,
        "write the mean of several checkpoints or models, uniform or weighted",
        "run/step_900 run/step_1000 --out mean",
        (
            _argument("checkpoints", metavar="CKPT", nargs="+", help=_SIDE),
            _argument(
                "--weights", type=_numbers, metavar="W,...", help="such as 1,2,1 (default: equal)"
            ),
            _profile("of our checkpoints"),
            _argument(
                "--prefix",
                help="key prefix of the average or model in a larger checkpoint (default: the only "
                "average there)",
            ),
            *_writing("that of the last input"),
        ),
    ),
    "advise": Command(
        advise,
        "say what a decay means for a run of so many steps",
        "--steps 10000 --half-life 500",
        (
            _argument("--steps", type=int, required=True, metavar="N", help="of the optimizer"),
            _argument(
                "--batch",
                type=float,
                metavar="B",
                help="tokens or images in a step, of all ranks (default: lengths in steps alone)",
            ),
            _argument(
                "--unit",
                choices=UNITS,
                default=UNITS[0],
                help="of --half-life and of the report (default: %(default)s)",
            ),
            _argument(
                "--decay",
                type=float,
                metavar="D",
                help="a constant decay per step (default: none, see --half-life)",
            ),
            _argument(
                "--half-life",
                type=float,
                metavar="H",
                help="after which a weight counts half (default: a twentieth of the run)",
            ),
            _argument(
                "--sigma-rel",
                type=float,
                metavar="S",
                help="width of a power-function average (default: none, see --half-life)",
            ),
            _argument("--plot", metavar="FILE", help="draw weights and seed (default: none)"),
        ),
    ),
    "env": Command(
        env,
        "say which versions are installed and what updates an average on which device",
        "--json",
        (),
    ),
}


EXIT_CODES = """exit status:
  0    all is well
  1    a check failed: something differs, is damaged, or is not what was asked for
  2    wrong use, or something cannot be read or written
  130  interrupted by Ctrl-C"""
WRONG_USE = 2
INTERRUPTED = 130

#: Of every command, and of none of the tools.
COMMON = (
    _argument("--json", action="store_true", help="print the report as JSON (default: as text)"),
    _argument(
        "--debug",
        action="store_true",
        help="show where in the program an error comes from (default: its message)",
    ),
)


class _Parser(argparse.ArgumentParser):
    """One that says in JSON as well what is wrong with its arguments, if ``in_json`` is set."""

    in_json = False

    def error(self, message: str) -> NoReturn:
        if self.in_json:
            command = self.prog.rpartition(" ")[2]
            _say_json(Report.of_error(command, "", "UsageError", message, WRONG_USE))
        super().error(message)


def build_parser(*, in_json: bool = False) -> argparse.ArgumentParser:
    """All commands and their flags.

    Args:
        in_json: say in JSON as well what is wrong with the arguments.
    """
    parser = _Parser(
        prog="sharded-ema",
        description="Tools for sharded checkpoints of averaged weights. They need no GPU, no "
        "torchrun and no PyTorch.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.in_json = in_json
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"Flags without a value are off unless they are given.\n\n"
            f"example:\n  sharded-ema {name} {command.example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.in_json = in_json
        for argument in (*command.arguments, *COMMON):
            sub.add_argument(argument.name, **argument.settings)
    return parser


def call(arguments: argparse.Namespace) -> Any:
    """Call the tool that the command names; what it returns."""
    command = COMMANDS[arguments.command]
    apart = {"command", *(each.name.removeprefix("--") for each in COMMON)}
    values = {k: v for k, v in vars(arguments).items() if k not in apart}
    return command.tool(*[values.pop(name) for name in _places(command)], **values)


def _fill_in(arguments: argparse.Namespace) -> None:
    """What the environment says unless it was given."""
    if arguments.command == "consolidate" and arguments.part is None:
        arguments.part = Part.of_torchrun(os.environ)


def _places(command: Command) -> list[str]:
    """The arguments that are no flags."""
    return [each.name for each in command.arguments if not each.name.startswith("-")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; see the module for exit codes."""
    return _main(argv, ends=False)


def run() -> int:
    """The command as a process of its own: :func:`main`, after which Ctrl-C has nothing to stop.

    The end of the interpreter waits for threads that still write, and would be interrupted with a
    traceback.
    """
    status = _main(None, ends=True)
    if status != INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def _main(argv: Sequence[str] | None, *, ends: bool) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = build_parser(in_json="--json" in given).parse_args(given)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may hold what the terminal does not write
            stream.reconfigure(errors="backslashreplace")
    _fill_in(arguments)
    goes_on = arguments.command == "consolidate"
    said = "sharded-ema: interrupted" + goes_on * "; the same command goes on where this one was"
    with Interruption(said, INTERRUPTED, ends=ends) as interruption:
        try:
            if arguments.command == "watch":
                return _watch(arguments, interruption)
            report = call(arguments)
            if arguments.json:
                _say_json(report, indent=1)
            else:
                _say(report.text())
        except KeyboardInterrupt:
            interruption.say()
            return INTERRUPTED
        except (EMAError, OSError, MemoryError) as error:
            return _tell(error, arguments)
    return 0 if report.ok else 1


def _tell(error: Exception, arguments: argparse.Namespace) -> int:
    """Say what went wrong, on one line; the exit status."""
    status = 1 if isinstance(error, CheckpointCorruptError) else WRONG_USE
    message = str(error) or type(error).__name__
    if arguments.debug:
        traceback.print_exception(error)
    print(printable(f"sharded-ema: error: {message}"), file=sys.stderr)
    if arguments.json:
        report = Report.of_error(
            arguments.command, _subject(arguments), type(error).__name__, message, status
        )
        with suppress(OSError):  # which may have been the error
            _say_json(report, indent=1)
    return status


def _subject(arguments: argparse.Namespace) -> str:
    """The first argument that is no flag, or those that stand in its place."""
    for name in _places(COMMANDS[arguments.command]):
        value = getattr(arguments, name)
        return value if isinstance(value, str) else ", ".join(value)
    return ""


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


def _say_json(report: Report, indent: int | None = None) -> bool:
    return _say(json.dumps(report.to_dict(), indent=indent, allow_nan=False))


def _watch(arguments: argparse.Namespace, interruption: Interruption) -> int:
    """Print a line for each report, until SIGTERM or SIGINT, which abandon an export under way."""
    ok = True
    try:
        with interruption.by_termination(), closing(call(arguments)) as reports:
            for report in reports:
                ok &= report.ok
                if not (_say_json(report) if arguments.json else _say(_line(report))):
                    break
    except KeyboardInterrupt:
        return 1 if arguments.once else 0
    return 0 if ok else 1


def _line(report: Report) -> str:
    facts, said = report.facts, [*report.notes, *(f"FAILED: {p}" for p in report.problems)]
    if report.ok and "output" in facts:
        what = f"step {facts['step']}, {size(facts['bytes'])} in {facts['seconds']:.3g} s"
        said.insert(0, f"exported to {facts['output']} ({what})")
    return printable(f"{report.path}: {'; '.join(said)}")
