"""Training by accelerate: DDP, FSDP1 or FSDP2, as ``accelerate launch`` was configured."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from accelerate_config import is_on
from language_model import build_optimizer, parameter_groups
from options import Options
from ranks import Ranks, RunError
from sharded_ema import ShardedEMA
from torch_engine import TorchEngine

_KINDS: dict[type, str] = {
    FSDPModule: "FSDP2",
    FullyShardedDataParallel: "FSDP1",
    DistributedDataParallel: "DDP",
}


class AccelerateEngine(TorchEngine):
    """A model that accelerate has prepared; its training state is that of PyTorch's other ways."""

    def __init__(self, bare: PreTrainedModel, options: Options, ranks: Ranks) -> None:
        self._options = options
        self._ranks = ranks
        self._accelerator = Accelerator(
            cpu=ranks.device.type == "cpu",
            mixed_precision={"float32": "no", "bfloat16": "bf16"}[options.dtype],
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=options.accumulation, sync_with_dataloader=False
            ),
        )
        optimizer = build_optimizer(parameter_groups(bare, options), options)
        self.model, self._prepared = self._accelerator.prepare(bare, optimizer)
        self.optimizer = self._prepared.optimizer
        self.layout = f"accelerate ({_kind(self.model)})"
        ranks.everywhere(self._check)

    def _check(self) -> None:
        """Refuse a run that is not what was asked for.

        accelerate shards on accelerators only: on CPUs it takes FSDP for DDP and says nothing.
        """
        asked, kind = "DDP", _kind(self.model)
        if is_on(os.environ, "ACCELERATE_USE_FSDP"):
            asked = f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
        if kind != asked:
            raise RunError(
                f"accelerate was asked for {asked}, but has made {kind} of the model (its "
                f"distributed_type is {self._accelerator.distributed_type.value}, on "
                f"{self._accelerator.device.type}). It shards on GPUs only: start this on GPUs, "
                "or take --parallel fsdp2 or fsdp1, which shard on CPUs too"
            )
        trained = {id(p) for p in self.model.parameters()}
        if any(id(p) not in trained for g in self.optimizer.param_groups for p in g["params"]):
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


def _kind(model: nn.Module) -> str:
    """What has been made of a model."""
    return next((kind for cls, kind in _KINDS.items() if isinstance(model, cls)), "no wrapper")
