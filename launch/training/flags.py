"""Command line of the training program: flags, their defaults and the checks between them."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sharded_ema import Constant, EMAError, HalfLife, Schedule
from sharded_ema.averaging.schedules import parse_schedule  # SCHEDULE of --ema-profile
from training.engines.accelerate import agreed_dtype
from training.engines.deepspeed import complete_config, read_config, zero_stage
from training.engines.torch import group_sizes
from training.options import Options, UsageError
from training.tokenizer import NUM_BYTES

# Kept apart from the parser so that "was it given?" can be told: --model excludes them.
SHAPE_DEFAULTS = {"hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2}
ZERO_STAGES = ("zero0", "zero1", "zero2", "zero3")
TORCH_WAYS = ("fsdp2", "fsdp1", "hsdp", "tp", "ddp")
EMA_DECAY = 0.95  # 20 steps: fits the 400 of the default run, not a long one


def _number(kind: type, check: Callable[[float], bool], text: str) -> Callable[[str], float]:
    """An argparse type: ``kind`` within the range that ``check`` accepts and ``text`` names."""

    def convert(value: str) -> float:
        number = kind(value)
        if not check(number):
            raise argparse.ArgumentTypeError(f"must be {text}, got {value}")
        return number

    convert.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return convert


POSITIVE = _number(int, lambda v: v >= 1, "at least 1")
COUNT = _number(int, lambda v: v >= 0, "at least 0")
RATE = _number(float, lambda v: 0 < v < math.inf, "positive and finite")
AMOUNT = _number(float, lambda v: 0 <= v < math.inf, "at least 0 and finite")
FRACTION = _number(float, lambda v: 0 <= v <= 1, "between 0 and 1")
BETA = _number(float, lambda v: 0 <= v < 1, "at least 0 and below 1")


def _profile(text: str) -> tuple[str, Schedule]:
    """``name=spec`` of --ema-profile."""
    name, separator, spec = text.partition("=")
    if not (separator and name and spec):
        raise argparse.ArgumentTypeError(f"write NAME=SCHEDULE, as in slow=power:0.1, not {text}")
    try:
        return name, parse_schedule(spec)
    except EMAError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    """All flags; the defaults make a run of a few minutes on two CPU cores."""
    parser = argparse.ArgumentParser(
        description="Train a causal language model and keep a sharded average of it.",
        epilog="torchrun --nproc-per-node 8 train.py --ema",
        allow_abbrev=False,  # --ema-p must not pick a flag by luck
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="files or directories of text (default: Python's standard library)",
    )
    data.add_argument(
        "--data-bytes",
        type=POSITIVE,
        default=20_000_000,
        help="read at most this much (default: %(default)s)",
    )
    data.add_argument(
        "--vocab-size",
        type=_number(int, lambda v: v >= NUM_BYTES, f"at least {NUM_BYTES}"),
        default=NUM_BYTES,
        metavar="N",
        help="tokens: the 256 bytes, and byte pairs learned from the training text (default: "
        "%(default)s, bytes alone)",
    )
    data.add_argument(
        "--workers", type=COUNT, default=0, help="processes of each rank that read ahead"
    )
    data.add_argument("--seed", type=COUNT, default=0, help="of the weights and of the batches")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="directory with a Hugging Face config.json; replaces the shape flags",
    )
    for name, value in SHAPE_DEFAULTS.items():
        model.add_argument(_flag(name), type=POSITIVE, help=f"(default: {value})")
    model.add_argument(
        "--intermediate-size", type=POSITIVE, help="(default: 2.75 x the hidden size)"
    )
    model.add_argument(
        "--tie-embeddings",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one matrix for input and output embeddings (default: yes)",
    )
    model.add_argument("--context", type=POSITIVE, default=128, help="tokens per sequence")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=POSITIVE, default=400, help="optimizer steps in all")
    training.add_argument(
        "--batch-size",
        type=POSITIVE,
        default=16,
        help="sequences per optimizer step, over all ranks",
    )
    training.add_argument(
        "--accumulation",
        type=POSITIVE,
        default=1,
        help="micro-batches into which each rank cuts its share of a step",
    )
    training.add_argument("--lr", type=RATE, default=8e-3, help="peak learning rate")
    training.add_argument(
        "--min-lr-ratio",
        type=FRACTION,
        default=0.7,
        help="learning rate at the end of the cosine, as a part of the peak",
    )
    training.add_argument("--warmup-steps", type=COUNT, default=20)
    training.add_argument("--beta1", type=BETA, default=0.9)
    training.add_argument("--beta2", type=BETA, default=0.95)
    training.add_argument("--weight-decay", type=AMOUNT, default=0.1)
    training.add_argument("--clip-norm", type=AMOUNT, default=1.0, help="0 turns clipping off")

    system = parser.add_argument_group("parallelism and precision")
    system.add_argument(
        "--parallel",
        choices=(*TORCH_WAYS, "accelerate", "none", *ZERO_STAGES),
        help="(default: fsdp2 with several ranks, else none); hsdp: shards within groups of ranks, "
        "replicas across; tp: the matrices of each block cut among neighbours, fsdp2 across; "
        "accelerate: as its configuration says; zero0 to zero3 are DeepSpeed's",
    )
    system.add_argument(
        "--shard-size",
        type=POSITIVE,
        metavar="RANKS",
        help="of hsdp, in a group (default: those of a machine; on a single machine half of them)",
    )
    system.add_argument(
        "--tp-size", type=POSITIVE, metavar="RANKS", help="of tp, to a matrix (default: 2)"
    )
    system.add_argument(
        "--deepspeed",
        type=Path,
        metavar="FILE",
        help="configuration of DeepSpeed, with the stage; instead of --parallel",
    )
    # The deepspeed launcher adds it; the environment says the same.
    system.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    system.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation; the parameters stay float32",
    )
    system.add_argument("--pure-bf16", action="store_true", help="bfloat16 parameters as well")
    system.add_argument("--activation-checkpointing", action="store_true")
    system.add_argument("--compile", action="store_true", help="torch.compile each block")

    ema = parser.add_argument_group("average")
    ema.add_argument("--ema", action="store_true", help="keep an exponential moving average")
    kind = ema.add_mutually_exclusive_group()
    kind.add_argument("--ema-decay", type=FRACTION, help=f"per step (default: {EMA_DECAY})")
    kind.add_argument(
        "--ema-half-life",
        type=RATE,
        metavar="STEPS",
        help="steps after which a weight counts half; instead of a decay",
    )
    kind.add_argument(
        "--ema-profile",
        type=_profile,
        action="append",
        metavar="NAME=SCHEDULE",
        help="repeatable, e.g. slow=half_life:200 or wide=power:0.1",
    )
    ema.add_argument("--ema-start-step", type=COUNT, help="step at which the average begins")
    ema.add_argument("--ema-update-every", type=POSITIVE, help="optimizer steps per update")

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/<date and time>)")
    run.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: the last checkpoint of --out, or from scratch; PATH: a run or "
        "one step directory of it",
    )
    run.add_argument("--eval-every", type=POSITIVE, default=20)
    run.add_argument("--eval-sequences", type=POSITIVE, default=128)
    run.add_argument(
        "--generate-tokens",
        type=COUNT,
        default=0,
        metavar="N",
        help="at the end, gather each average, round it to bfloat16 and note the N tokens that it "
        "writes; takes memory for the whole model on the first rank (default: 0, nothing)",
    )
    run.add_argument("--prompt", default="def ", help="of that text (default: %(default)r)")
    run.add_argument("--log-every", type=POSITIVE, default=5)
    run.add_argument("--save-every", type=POSITIVE, default=100)
    run.add_argument("--keep-last", type=POSITIVE, default=2, help="checkpoints kept")
    run.add_argument(
        "--async-save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy what is saved and train on while it is written (default: yes); DeepSpeed and a "
        "single process wait",
    )
    return parser


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Parse and cross-check the command line; wrong use ends the process with code 2."""
    parser = build_parser()
    values = vars(parser.parse_args(argv))
    try:
        return _settle(values, int(os.environ.get("WORLD_SIZE", "1")))
    except UsageError as error:
        parser.error(str(error))


def _settle(values: dict[str, Any], ranks: int) -> Options:
    """Options of what was parsed: each part checks its flags and fills in what was not given.

    Raises:
        UsageError: flags contradict each other, the launcher, or a framework's configuration.
    """
    _settle_model(values)
    _settle_parallelism(values, ranks)
    if values["parallel"] == "accelerate":
        _settle_accelerate(values)
    values["dtype"] = values["dtype"] or ("bfloat16" if values["pure_bf16"] else "float32")
    if values["parallel"] in ZERO_STAGES:
        _settle_deepspeed(values, ranks)
    values["profiles"] = _profiles(values)
    values["ema_start_step"] = values["ema_start_step"] or 0
    values["ema_update_every"] = values["ema_update_every"] or 1
    for name in ("ema", "ema_decay", "ema_half_life", "ema_profile", "local_rank"):
        del values[name]
    parts = ranks // values["tp_size"]
    if values["batch_size"] < parts * values["accumulation"]:
        each = "ranks" if parts == ranks else f"groups of {values['tp_size']} ranks"
        raise UsageError(
            f"--batch-size {values['batch_size']} is less than one sequence for each of "
            f"{parts} {each} x {values['accumulation']} micro-batches"
        )
    if values["resume"] == "auto" and values["out"] is None:
        raise UsageError("--resume auto looks in --out, which is not given")
    return Options(**values)


def _settle_model(values: dict[str, Any]) -> None:
    shape = [*SHAPE_DEFAULTS, "intermediate_size", "tie_embeddings"]
    if values["model"] is not None:
        for name in shape:
            if values[name] is not None:
                raise UsageError(f"{_flag(name)} does not go with --model, which has it")
    for name, value in SHAPE_DEFAULTS.items():
        values[name] = values[name] or value
    if values["tie_embeddings"] is None:
        values["tie_embeddings"] = True
    values["intermediate_size"] = values["intermediate_size"] or values["hidden_size"] * 11 // 4
    if values["hidden_size"] % (2 * values["heads"]):
        raise UsageError("--hidden-size must be a multiple of twice --heads (rotary pairs)")
    if values["heads"] % values["kv_heads"]:
        raise UsageError("--heads must be a multiple of --kv-heads")


def _settle_parallelism(values: dict[str, Any], ranks: int) -> None:
    """The way to train, and the sizes of its groups; a DeepSpeed file has the way in its stage."""
    if values["deepspeed"] is not None:
        _read_deepspeed(values)
    if values["parallel"] is None:
        values["parallel"] = "fsdp2" if ranks > 1 else "none"
    parallel = values["parallel"]
    if parallel == "none" and ranks > 1:
        raise UsageError(f"--parallel none runs in one process, but {ranks} were started")
    if parallel != "none" and "RANK" not in os.environ:
        others = {"accelerate": " or accelerate launch"} | dict.fromkeys(
            ZERO_STAGES, " or deepspeed"
        )
        launchers = "torchrun" + others.get(parallel, "")
        raise UsageError(f"--parallel {parallel} needs {launchers} to start it")
    if values["pure_bf16"] and values["dtype"] == "float32":
        raise UsageError("--pure-bf16 contradicts --dtype float32")
    values |= group_sizes(values, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if parallel == "tp" and values["compile"] and values["activation_checkpointing"]:
        raise UsageError(
            "--parallel tp: PyTorch fails at --compile with --activation-checkpointing"
        )


def _settle_accelerate(values: dict[str, Any]) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("accelerate is not installed: pip install accelerate")
    if values["pure_bf16"]:
        raise UsageError("--pure-bf16 does not go with --parallel accelerate")
    values["dtype"] = agreed_dtype(os.environ, values["dtype"])


def _read_deepspeed(values: dict[str, Any]) -> None:
    """Read the file, whose stage is then what --parallel stands for."""
    path, parallel = values["deepspeed"], values["parallel"]
    values["deepspeed"] = read_config(path)
    stage = f"zero{zero_stage(values['deepspeed'])}"
    if parallel not in (None, stage):
        raise UsageError(
            f"--parallel {parallel} contradicts --deepspeed {path}, which says {stage}"
        )
    values["parallel"] = stage


def _settle_deepspeed(values: dict[str, Any], ranks: int) -> None:
    for name in ("pure_bf16", "compile"):
        if values[name]:
            raise UsageError(f"{_flag(name)} does not go with DeepSpeed")
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("DeepSpeed is not installed: pip install 'sharded-ema[deepspeed]'")
    stage = {"zero_optimization": {"stage": ZERO_STAGES.index(values["parallel"])}}
    values["deepspeed"] = complete_config(values["deepspeed"] or stage, values, ranks)


def _profiles(values: dict[str, Any]) -> dict[str, Schedule]:
    """The averages asked for, by name; the single one is called ``ema``."""
    given = [name for name in values if name.startswith("ema_") and values[name] is not None]
    if not values["ema"]:
        if given:
            raise UsageError(f"{_flag(given[0])} needs --ema")
        return {}
    start = values["ema_start_step"] or 0
    if start >= values["steps"]:
        raise UsageError(
            f"--ema-start-step {start} is not before the last of {values['steps']} steps"
        )
    if values["ema_half_life"] is not None:
        return {"ema": HalfLife(values["ema_half_life"])}
    if values["ema_profile"] is None:
        decay = EMA_DECAY if values["ema_decay"] is None else values["ema_decay"]
        return {"ema": Constant(decay)}
    profiles = dict(values["ema_profile"])
    if len(profiles) < len(values["ema_profile"]):
        raise UsageError("--ema-profile: each name once")
    return profiles


def _flag(name: str) -> str:
    """The flag whose value has this name."""
    return f"--{name.replace('_', '-')}"
