"""Training by accelerate: DDP, FSDP1 or FSDP2, as ``accelerate launch`` was configured.

accelerate is imported for those alone who train with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from sharded_ema import ShardedEMA
from training.engines.torch import (
    background_group,
    gather_weights,
    load_state,
    save_state,
)
from training.model import InitialWeights, build_optimizer, parameter_groups
from training.options import Options, UsageError
from training.ranks import Ranks, RunError

# Ways to train that accelerate's configuration can ask for, and what has them in this program.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "--parallel zero0 to zero3 or --deepspeed trains with DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "this program does not train with Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--parallel hsdp or tp arranges the ranks",
}
_DTYPES = {"no": "float32", "bf16": "bfloat16"}

_KINDS: dict[type, str] = {
    FSDPModule: "FSDP2",
    FullyShardedDataParallel: "FSDP1",
    DistributedDataParallel: "DDP",
}


def agreed_dtype(environment: Mapping[str, str], dtype: str | None) -> str | None:
    """The precision of the computation that ``--dtype`` and accelerate's configuration ask for.

    Returns:
        None if neither says it.

    Raises:
        UsageError: they contradict each other, or the configuration asks for what is not done.
    """
    for name, instead in _REFUSED.items():
        if _is_on(environment, name):
            raise UsageError(f"accelerate's configuration sets {name}: {instead}")
    precision = environment.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        return dtype
    if precision not in _DTYPES:
        raise UsageError(
            f"mixed_precision is {precision!r} in accelerate's configuration; this program "
            f"trains with {' or '.join(map(repr, _DTYPES))}"
        )
    if dtype not in (None, _DTYPES[precision]):
        raise UsageError(
            f"--dtype {dtype} contradicts mixed_precision {precision!r} of accelerate's "
            "configuration"
        )
    return _DTYPES[precision]


class AccelerateEngine:
    """A model that accelerate has prepared; its training state is that of PyTorch's other ways."""

    saves_average = False

    def __init__(self, bare: PreTrainedModel, options: Options, ranks: Ranks) -> None:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin

        self._options = options
        self._ranks = ranks
        self._accelerator = Accelerator(
            cpu=ranks.device.type == "cpu",
            mixed_precision={"float32": "no", "bfloat16": "bf16"}[options.dtype],
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=options.accumulation, sync_with_dataloader=False
            ),
        )
        InitialWeights(bare, options.seed, ranks.device).fill_all()  # accelerate shards what it has
        optimizer = build_optimizer(parameter_groups(bare, options), options)
        self.model: nn.Module
        self.model, self._prepared = self._accelerator.prepare(bare, optimizer)
        self._optimizer = self._prepared.optimizer  # PyTorch's, whose state is saved
        self._background = background_group(options)
        self.layout = f"accelerate ({_kind(self.model)})"
        ranks.everywhere(self._check)

    def _check(self) -> None:
        """Refuse a run that is not what was asked for.

        accelerate shards on accelerators only: on CPUs it takes FSDP for DDP and says nothing.
        """
        asked, kind = "DDP", _kind(self.model)
        if _is_on(os.environ, "ACCELERATE_USE_FSDP"):
            asked = f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
        if kind != asked:
            raise RunError(
                f"accelerate was asked for {asked}, but has made {kind} of the model (its "
                f"distributed_type is {self._accelerator.distributed_type.value}, on "
                f"{self._accelerator.device.type}). It shards on GPUs only: start this on GPUs, "
                "or take --parallel fsdp2 or fsdp1, which shard on CPUs too"
            )
        trained = {id(p) for p in self.model.parameters()}
        if any(id(p) not in trained for g in self._optimizer.param_groups for p in g["params"]):
            raise RunError(
                "accelerate has replaced the parameters that the optimizer was made for: write "
                "fsdp_use_orig_params: true into its configuration"
            )

    def precision(self) -> AbstractContextManager[Any]:
        """Nothing: accelerate lowers the precision within the model."""
        return nullcontext()

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Counted by accelerate, which knows the last one by their number."""
        return self._accelerator.accumulate(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        # accelerate divides by the number of micro-batches; the loss has its share already.
        self._accelerator.backward(loss * self._options.accumulation)

    def step(self, rate: float) -> torch.Tensor | float | None:
        for group in self._prepared.param_groups:
            group["lr"] = rate
        norm = None
        if self._options.clip_norm:
            norm = self._accelerator.clip_grad_norm_(
                self.model.parameters(), self._options.clip_norm
            )
        self._prepared.step()
        self._prepared.zero_grad()
        return norm

    def attach(self, ema: ShardedEMA) -> None:
        ema.attach(self._prepared)

    def gather(self) -> dict[str, torch.Tensor]:
        return gather_weights(self.model, self._ranks)

    def save(self, path: Path) -> Callable[[], None]:
        return save_state(path, self.model, self._optimizer, self._background)

    def load(self, path: Path) -> None:
        load_state(path, self.model, self._optimizer)


def _kind(model: nn.Module) -> str:
    """What has been made of a model."""
    return next((kind for cls, kind in _KINDS.items() if isinstance(model, cls)), "no wrapper")


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a switch in the environment is on, as accelerate reads it."""
    return environment.get(name, "false").lower() == "true"
