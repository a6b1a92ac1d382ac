"""Training by DeepSpeed: ZeRO 0 to 3. All that is particular to it, but for its configuration."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from deepspeed_config import Config, compiled_operator
from engine import Engine
from language_model import build_optimizer, parameter_groups
from options import Options
from ranks import Ranks, RunError
from sharded_ema import ShardedEMA


class DeepSpeedEngine(Engine):
    """A DeepSpeed engine; its checkpoints are DeepSpeed's own, with the average in them."""

    model: Any  # deepspeed.DeepSpeedEngine

    def __init__(self, bare: PreTrainedModel, options: Options, ranks: Ranks) -> None:
        assert options.deepspeed is not None
        config = options.deepspeed
        self.layout = options.parallel
        self._ranks = ranks
        deepspeed = _start_deepspeed(ranks.device)
        _check_config(config)
        groups = parameter_groups(bare, options)
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

    def save(self, path: Path, ema: ShardedEMA | None, step: int) -> None:
        """The attached average goes along; ``latest`` is left to the run, which adds its own."""
        self.model.save_checkpoint(str(path.parent), tag=path.name, save_latest=False)

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
    operator = compiled_operator(config)
    tools = ["ninja", os.environ.get("CXX", "c++")]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if operator and missing and not installed_ops.get(operator):
        raise RunError(
            f"DeepSpeed compiles {operator} for its own AdamW, but {' and '.join(missing)} is not "
            "on PATH. ninja comes with DeepSpeed: activate the environment it is installed in; a "
            'compiler comes with the system. Or remove "optimizer" from the configuration, and '
            "PyTorch's AdamW steps"
        )
