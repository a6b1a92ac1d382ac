"""DeepSpeed's configuration: completed from the flags, or refused where it contradicts them.

Nothing here imports DeepSpeed, so that a wrong command line is told at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharded_ema.errors import ConfigError

AUTO = "auto"
Config = dict[str, Any]

# These would lower the precision, or set the learning rate, behind the back of the flags.
_TAKEN = {
    "fp16": "--dtype is float32 or bfloat16",
    "amp": "--dtype is float32 or bfloat16",
    "torch_autocast": "bf16 is what --dtype bfloat16 means here",
    "bfloat16": "write bf16",
    "scheduler": "--lr, --warmup-steps and --min-lr-ratio make the schedule",
}

# PyTorch's training state loads on any number of ranks, and whatever way it spreads the model.
TORCH_STATE = {"written by": "PyTorch"}


def read_config(path: Path) -> Config:
    """A configuration file.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed {path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {path} holds no JSON object")
    return config


def complete(config: Config, flags: Mapping[str, Any], ranks: int) -> Config:
    """The configuration with everything that the flags say; what says it otherwise is refused.

    Args:
        config: from a file, or ``{"zero_optimization": {"stage": ...}}`` alone. A key that a flag
            decides may be absent, ``"auto"``, or equal to the flag.
        flags: the parsed command line.
        ranks: processes of the run.

    Raises:
        ConfigError: a contradiction; the message has the key and the flag.
    """
    config = json.loads(json.dumps(config))  # a copy, all the way down
    _refuse_or_drop(config)
    for key, value, flag in _decided(flags, ranks, optimizer="optimizer" in config):
        parent = _section(config, key[:-1])
        found = parent.get(key[-1], AUTO)
        if found not in (AUTO, value):
            raise ConfigError(
                f"{'.'.join(key)} is {json.dumps(found)} in the DeepSpeed configuration, but "
                f'{flag} makes it {json.dumps(value)}; let them agree, or write "auto" there'
            )
        parent[key[-1]] = value
    # Offloaded weights are stepped by PyTorch's own AdamW, which needs no compiler.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config["zero_optimization"]["stage"] = zero_stage(config)
    for section in (config["zero_optimization"], config.get("optimizer", {}).get("params", {})):
        for name in [name for name, value in section.items() if value == AUTO]:
            del section[name]  # no flag decides it, so DeepSpeed's default does
    return config


def _section(config: Config, names: Sequence[str]) -> Config:
    """The part of a configuration under ``names``, made if it is not there."""
    for name in names:
        config = config.setdefault(name, {})
        if not isinstance(config, dict):
            raise ConfigError(f"{name} must be an object in the DeepSpeed configuration")
    return config


def _refuse_or_drop(config: Config) -> None:
    """Refuse what this program does not do, and drop the sections that turn it off."""
    for name, why in _TAKEN.items():
        value = config.pop(name, None)
        if value and not (isinstance(value, dict) and value.get("enabled") in (False, AUTO)):
            raise ConfigError(f"the DeepSpeed configuration has {name!r}: {why}")
    if "optimizer" in config:
        kind = _section(config, ["optimizer"]).get("type")
        if str(kind).lower() != "adamw":
            raise ConfigError(
                f"optimizer.type is {kind!r} in the DeepSpeed configuration; this program trains "
                'with "AdamW"'
            )
    for name in ("offload_optimizer", "offload_param"):
        target = _section(config, ["zero_optimization"]).get(name)
        if isinstance(target, dict) and target.get("device") == "nvme":
            raise ConfigError(
                f"zero_optimization.{name} is to NVMe, where no average can follow the weights; "
                'offload to "cpu"'
            )


def _decided(
    flags: Mapping[str, Any], ranks: int, *, optimizer: bool
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Keys that flags decide, their values, and the flags."""
    size, parts = flags["batch_size"], flags["accumulation"]
    micro, rest = divmod(size, ranks * parts)
    if rest:
        raise ConfigError(
            f"--batch-size {size} must be a multiple of {ranks} ranks x {parts} micro-batches "
            "under DeepSpeed, which counts in whole micro-batches"
        )
    shares = f"--batch-size {size} on {ranks} ranks with --accumulation {parts}"
    yield ("train_batch_size",), size, f"--batch-size {size}"
    yield ("train_micro_batch_size_per_gpu",), micro, shares
    yield ("gradient_accumulation_steps",), parts, f"--accumulation {parts}"
    yield ("gradient_clipping",), flags["clip_norm"], f"--clip-norm {flags['clip_norm']}"
    yield ("bf16", "enabled"), flags["dtype"] == "bfloat16", f"--dtype {flags['dtype']}"
    # Every call of step() would be taken for an optimizer step.
    yield ("managed_gradient_accumulation",), True, "this program"
    if optimizer:
        yield ("optimizer", "params", "lr"), flags["lr"], f"--lr {flags['lr']}"
        betas = [flags["beta1"], flags["beta2"]]
        yield ("optimizer", "params", "betas"), betas, "--beta1 and --beta2"
        decay = flags["weight_decay"]
        yield ("optimizer", "params", "weight_decay"), decay, f"--weight-decay {decay}"


def zero_stage(config: Config) -> int:
    """The stage that a configuration asks for.

    Raises:
        ConfigError: none of 0 to 3.
    """
    stage = _section(config, ["zero_optimization"]).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"zero_optimization.stage is {stage!r} in the DeepSpeed configuration; it must be "
            "0, 1, 2 or 3"
        )
    return stage


def compiled_operator(config: Config) -> str | None:
    """DeepSpeed's name of the operator that it has to compile for a complete configuration."""
    optimizer, zero = config.get("optimizer"), config["zero_optimization"]
    if optimizer is None or optimizer["params"].get("torch_adam"):
        return None
    return "cpu_adam" if zero.get("offload_optimizer") else "fused_adam"


def state_layout(config: Config | None, ranks: int) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes it.

    DeepSpeed's training state loads only into the partitions that it was saved from.
    """
    if config is None:
        return TORCH_STATE
    zero = config["zero_optimization"]
    return {
        "written by": "DeepSpeed",
        "ranks": ranks if zero["stage"] else "any",
        "ZeRO stage": zero["stage"],
        "bf16": config["bf16"]["enabled"],
        "sub_group_size": zero.get("sub_group_size"),
        "round_robin_gradients": zero.get("round_robin_gradients", False),
    }


def why_not_resumable(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why training state of the layout ``old`` cannot be loaded into ``new``; None if it can."""
    if old == new:
        return None
    if old["written by"] != new["written by"]:
        return (
            f"its training state was written by {old['written by']} and cannot be loaded by "
            f"{new['written by']}; give the --parallel or --deepspeed of then"
        )
    changes = [
        f"{name} was {old[name]} and is now {new[name]}" for name in new if old[name] != new[name]
    ]
    return (
        f"DeepSpeed loads optimizer state only as it was saved, and {'; '.join(changes)}. Resume "
        "as then; or convert it by python -m deepspeed.checkpoint.ds_to_universal, and go on from "
        "DeepSpeed's universal checkpoint in a program of your own"
    )
