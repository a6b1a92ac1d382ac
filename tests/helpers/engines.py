"""DeepSpeed engines around the ragged model, and what they train read by other means than ours."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.layouts import Ragged, rank, world

os.environ["DS_ACCELERATOR"] = "cpu"
deepspeed = pytest.importorskip(
    "deepspeed", reason="DeepSpeed is not installed: pip install 'sharded-ema[deepspeed]'"
)
# Its communication extension would be compiled at the first start; gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("ERROR")

STAGES = (0, 1, 2, 3)


class Model(Ragged):
    """Without 0-d and strided parameters, which DeepSpeed 0.19.8 cannot broadcast."""

    odd_tensors = False


@dataclass
class Engine:
    """An engine in training."""

    engine: Any
    stage: int

    @property
    def module(self) -> Model:
        return self.engine.module

    def loss(self, index: int) -> Tensor:
        """Of data that depends on the rank and ``index`` alone."""
        generator = torch.Generator().manual_seed(1000 * index + rank())
        x = torch.randn(4, 7, generator=generator).to(self.dtype)
        return self.engine(x).float().square().mean()

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.module.parameters())

    def step(self, index: int) -> float:
        """One micro-batch; an optimizer step where accumulation ends."""
        loss = self.loss(index)
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())

    def evaluate(self) -> Tensor:
        x = torch.linspace(-1, 1, 21).view(3, 7).to(self.dtype)
        with torch.no_grad():
            return self.engine(x).detach().float().clone()

    def weights(self) -> dict[str, Tensor]:
        """All parameters of the model, whole, by DeepSpeed's own means."""
        found = {}
        for name, parameter in self.module.named_parameters():
            gather = (
                deepspeed.zero.GatheredParameters([parameter])
                if hasattr(parameter, "ds_id")
                else nullcontext()
            )
            with gather:
                found[name] = parameter.detach().clone()
        return found

    def masters(self) -> dict[str, Tensor]:
        """What is trained in full precision, whole."""
        optimizer = self.engine.optimizer
        trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if self.dtype == torch.float32:  # then the weights are the masters, bit for bit
            return {n: w for n, w in self.weights().items() if n in trained}
        if self.stage == 0:
            pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            by_id = {id(p): m for ps, ms in pairs for p, m in zip(ps, ms, strict=True)}
            return {name: by_id[id(p)].detach().clone() for name, p in trained.items()}
        if getattr(optimizer, "round_robin_gradients", False):
            return self._flat_masters(trained)
        return {
            name: deepspeed.utils.safe_get_full_fp32_param(p).clone() for name, p in trained.items()
        }

    def _flat_masters(self, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """All partitions behind one another, cut up in the order that round robin made."""
        names = {id(p): name for name, p in trained.items()}
        found = {}
        optimizer = self.engine.optimizer
        for own, order in zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            strict=True,
        ):
            parts = [torch.empty_like(own) for _ in range(world())]
            dist.all_gather(parts, own.detach().clone())
            flat = torch.cat(parts)
            for parameter in order:
                size = parameter.numel()
                found[names[id(parameter)]] = flat[:size].view(parameter.shape).clone()
                flat = flat[size:]
        return found


def allow_fp16() -> None:
    """The CPU accelerator refuses fp16 where the processor has no fast arithmetic for it."""
    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]


def config(stage: int, precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    """A configuration for CPUs without compiled operators; ``zero=`` adds to its ZeRO part."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage, **changes.pop("zero", {})},
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if precision == "fp16":
        allow_fp16()
        settings["fp16"] = {
            "enabled": True,
            "initial_scale_power": 8,
            "loss_scale_window": 1000,
            "hysteresis": 1,
        }
    return settings | changes


def build(
    stage: int,
    precision: str = "fp32",
    *,
    seed: int = 0,
    zero_init: bool = False,
    lr: float = 1e-2,
    weight_decay: float = 0.01,
    **changes: Any,
) -> Engine:
    """The ragged model in an engine with two parameter groups, the same weights on all ranks."""
    settings = config(stage, precision, **changes)
    torch.manual_seed(seed)
    with deepspeed.zero.Init(config_dict_or_path=settings) if zero_init else nullcontext():
        model = Model()
    matrices, others = [], []
    for parameter in model.parameters():
        wide = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        if parameter.requires_grad:
            (matrices if wide else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=lr,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return Engine(engine, stage)
