"""Training by DeepSpeed, ZeRO 0 to 3: its configuration, its engine, and what it can resume.

DeepSpeed is imported for those alone who train with it: that takes seconds, and a wrong command
line is told before.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from sharded_ema import ShardedEMA
from training.model import InitialWeights, build_optimizer, parameter_groups
from training.options import Options, UsageError
from training.ranks import Ranks, RunError

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


def read_config(path: Path) -> Config:
    """A configuration file.

    Raises:
        UsageError: it cannot be read, or is no JSON object.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--deepspeed {path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"--deepspeed {path} holds no JSON object")
    return config


def complete_config(config: Config, flags: Mapping[str, Any], ranks: int) -> Config:
    """The configuration with everything that the flags say; what says it otherwise is refused.

    Args:
        config: from a file, or ``{"zero_optimization": {"stage": ...}}`` alone. A key that a flag
            decides may be absent, ``"auto"``, or equal to the flag.
        flags: the parsed command line.
        ranks: processes of the run.

    Raises:
        UsageError: a contradiction; the message has the key and the flag.
    """
    config = json.loads(json.dumps(config))  # a copy, all the way down
    _refuse_or_drop(config)
    for key, value, flag in _decided(flags, ranks, optimizer="optimizer" in config):
        parent = _section(config, key[:-1])
        found = parent.get(key[-1], AUTO)
        if found not in (AUTO, value):
            raise UsageError(
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
            raise UsageError(f"{name} must be an object in the DeepSpeed configuration")
    return config


def _refuse_or_drop(config: Config) -> None:
    """Refuse what this program does not do, and drop the sections that turn it off."""
    for name, why in _TAKEN.items():
        value = config.pop(name, None)
        if value and not (isinstance(value, dict) and value.get("enabled") in (False, AUTO)):
            raise UsageError(f"the DeepSpeed configuration has {name!r}: {why}")
    if "optimizer" in config:
        kind = _section(config, ["optimizer"]).get("type")
        if str(kind).lower() != "adamw":
            raise UsageError(
                f"optimizer.type is {kind!r} in the DeepSpeed configuration; this program trains "
                'with "AdamW"'
            )
    for name in ("offload_optimizer", "offload_param"):
        target = _section(config, ["zero_optimization"]).get(name)
        if isinstance(target, dict) and target.get("device") == "nvme":
            raise UsageError(
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
        raise UsageError(
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
        UsageError: none of 0 to 3.
    """
    stage = _section(config, ["zero_optimization"]).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UsageError(
            f"zero_optimization.stage is {stage!r} in the DeepSpeed configuration; it must be "
            "0, 1, 2 or 3"
        )
    return stage


class DeepSpeedEngine:
    """A DeepSpeed engine; its checkpoints are DeepSpeed's own, with the average in them."""

    model: Any  # deepspeed.DeepSpeedEngine
    saves_average = True

    def __init__(self, bare: PreTrainedModel, options: Options, ranks: Ranks) -> None:
        assert options.deepspeed is not None
        config = options.deepspeed
        self.layout = options.parallel
        self._ranks = ranks
        deepspeed = _start_deepspeed(ranks.device)
        _check_config(config)
        weights = InitialWeights(bare, options.seed, ranks.device)
        for part in weights.parts:
            weights.fill(part)
            if zero_stage(config) == 3:  # the others keep the weights whole on every rank
                deepspeed.zero.Init(module=part, config_dict_or_path=config)
        # Partitions are flat: their shapes no longer tell which are matrices.
        groups = parameter_groups(bare, options, weights.matrices)
        own = "optimizer" in config
        self.model, *_ = deepspeed.initialize(
            model=bare,
            model_parameters=groups if own else None,
            optimizer=None if own else build_optimizer(groups, options),
            config=config,
        )

    def precision(self) -> AbstractContextManager[Any]:
        """Nothing: under bf16 the weights themselves have the lower precision."""
        return nullcontext()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield
        if not last:
            self.model.step()  # counts the micro-batch, and changes nothing yet

    def backward(self, loss: torch.Tensor) -> None:
        # Else divided by the number of micro-batches; the loss has its share of the sum already.
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, rate: float) -> torch.Tensor | float | None:
        for group in self.model.optimizer.param_groups:
            group["lr"] = rate
        self.model.step()
        return self.model.get_global_grad_norm()

    def attach(self, ema: ShardedEMA) -> None:
        ema.attach()

    def gather(self) -> dict[str, torch.Tensor]:
        from deepspeed import zero

        whole = {}
        for name, tensor in self.model.module.state_dict(keep_vars=True).items():
            with zero.GatheredParameters([tensor]):  # does nothing below stage 3
                if self._ranks.first:
                    whole[name] = tensor.detach().to("cpu", copy=True)
        return whole

    def save(self, path: Path) -> Callable[[], None]:
        """Wait for it. ``latest`` is left to the run, which adds its own."""
        self.model.save_checkpoint(str(path.parent), tag=path.name, save_latest=False)
        return lambda: None

    def load(self, path: Path) -> None:
        """On as many ranks as it was saved on."""
        found, _ = self.model.load_checkpoint(str(path.parent), tag=path.name)
        if found is None:
            raise RunError(f"{path} has no checkpoint of DeepSpeed")


def _start_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed in the process group that is there, without what it would compile at its start."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    # It gathers by a name that PyTorch is about to drop, and is told so at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPUs it would build its shared-memory all-reduce now, for a minute, or fail without
    # ninja. Only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    return deepspeed


def _check_config(config: Config) -> None:
    """Refuse what DeepSpeed refuses, in one line, and operators that cannot be compiled."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(config)
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise RunError(f"DeepSpeed refuses its configuration: {error}") from None
    operator = _compiled_operator(config)
    tools = ["ninja", os.environ.get("CXX", "c++")]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if operator and missing and not installed_ops.get(operator):
        raise RunError(
            f"DeepSpeed compiles {operator} for its own AdamW, but {' and '.join(missing)} is not "
            "on PATH. ninja comes with DeepSpeed: activate the environment it is installed in; a "
            'compiler comes with the system. Or remove "optimizer" from the configuration, and '
            "PyTorch's AdamW steps"
        )


def _compiled_operator(config: Config) -> str | None:
    """DeepSpeed's name of the operator that it has to compile for a complete configuration."""
    optimizer, zero = config.get("optimizer"), config["zero_optimization"]
    if optimizer is None or optimizer["params"].get("torch_adam"):
        return None
    return "cpu_adam" if zero.get("offload_optimizer") else "fused_adam"


def state_layout(config: Config, ranks: int) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes it.

    The training state loads only into the partitions that it was saved from.
    """
    zero = config["zero_optimization"]
    return {
        "written by": "DeepSpeed",
        "ranks": ranks if zero["stage"] else "any",
        "ZeRO stage": zero["stage"],
        "bf16": config["bf16"]["enabled"],
        "sub_group_size": zero.get("sub_group_size"),
        "round_robin_gradients": zero.get("round_robin_gradients", False),
    }


def why_not_resumable(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Why training state of the layout ``old`` cannot be loaded into ``new``, another one."""
    changes = [
        f"{name} was {old[name]} and is now {new[name]}" for name in new if old[name] != new[name]
    ]
    return (
        f"DeepSpeed loads optimizer state only as it was saved, and {'; '.join(changes)}. Resume "
        "as then; or convert it by python -m deepspeed.checkpoint.ds_to_universal, and go on from "
        "DeepSpeed's universal checkpoint in a program of your own"
    )
