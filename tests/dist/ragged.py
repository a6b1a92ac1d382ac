"""A model that is ragged on purpose, in every layout, and a reference that cannot share our bugs.

Sizes 1, 2, 3, 5, 7 and 10 over 2 to 4 ranks give uneven and empty shards; there are tied, frozen,
strided and 0-d parameters, and buffers of several kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

FSDP1: dict[str, dict[str, Any]] = {
    "fsdp1": {"sharding_strategy": ShardingStrategy.FULL_SHARD},
    "fsdp1_flat": {"sharding_strategy": ShardingStrategy.FULL_SHARD, "use_orig_params": False},
    "fsdp1_grad_op": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
    "fsdp1_no_shard": {"sharding_strategy": ShardingStrategy.NO_SHARD},
    "fsdp1_mixed": {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
    "fsdp1_bf16": {},
    "fsdp1_hybrid": {"sharding_strategy": ShardingStrategy.HYBRID_SHARD},
    "fsdp1_hybrid_flat": {
        "sharding_strategy": ShardingStrategy._HYBRID_SHARD_ZERO2,
        "use_orig_params": False,
    },
}
MODES = ("fsdp2", "fsdp2_mixed", "fsdp2_bf16", "ddp", "ddp_bf16", *FSDP1)


def sizes(mode: str, wanted: Sequence[int] = (2, 3, 4)) -> list[int]:
    """Those of the wanted world sizes that a mode runs on, or the one that it needs."""
    return [4] if "hybrid" in mode else list(wanted)  # 2 x 2


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(7, 10)
        self.blocks = nn.ModuleList([Block(10, 5), Block(10, 3)])
        self.out = nn.Linear(10, 2)
        self.tied = nn.Linear(7, 10, bias=False)
        self.tied.weight = self.inp.weight
        self.one = nn.Parameter(torch.full((1,), 1.5))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.transposed = nn.Parameter(torch.randn(5, 2).t() / 5)
        self.conv = nn.Conv2d(3, 2, 2)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.arange(5.0), requires_grad=False)
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x) + self.tied(x)
        for block in self.blocks:
            h = block(h)
        # Mixed precision converts what it shards; what it ignores stays as it is.
        scalar, skew = self.scalar.to(h.dtype), self.transposed.t().to(h.dtype)
        kernel, bias = self.conv.weight.to(h.dtype), self.conv.bias.to(h.dtype)
        h = self.out(h) * self.one + scalar + h[:, :5] @ skew
        image = x[:, :3, None, None].expand(-1, 3, 3, 3).to(h.dtype)
        h = h + nn.functional.conv2d(image, kernel, bias).mean((2, 3))
        return h + self.frozen.sum() / 10


@dataclass
class Run:
    """A model in training.

    Attributes:
        target: what a user passes to ShardedEMA.
        bare: the module inside wrappers, on which names are bare.
        optimizer: AdamW over the trainable parameters.
        unsynced: parameters whose gradients no wrapper averages.
    """

    target: nn.Module
    bare: Ragged
    optimizer: torch.optim.Optimizer
    unsynced: list[nn.Parameter] = field(default_factory=list)

    def step(self, index: int, *, backward_only: bool = False) -> float:
        """One optimizer step on data that depends on the rank and ``index`` alone."""
        generator = torch.Generator().manual_seed(1000 * index + rank())
        dtype = next(p.dtype for p in self.bare.parameters())
        x = torch.randn(4, 7, generator=generator).to(dtype)
        loss = self.target(x).float().square().mean()
        loss.backward()
        for parameter in self.unsynced:
            if parameter.grad is not None and world() > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world()
        if not backward_only:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.bare.running += 0.1
            self.bare.count += 1
        return float(loss.detach())

    def evaluate(self) -> Tensor:
        """A forward without backward, as an evaluation loop makes."""
        x = torch.linspace(-1, 1, 21).view(3, 7).to(next(p.dtype for p in self.bare.parameters()))
        with torch.no_grad():
            return self.target(x).detach().clone()

    def gather(self, *, frozen: bool = False) -> dict[str, Tensor]:
        """Full parameters by bare name, by PyTorch's own means: the trainable ones, or all."""
        for module in self.bare.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        is_fsdp1 = isinstance(self.target, FSDP)
        with FSDP.summon_full_params(self.target, writeback=False) if is_fsdp1 else nullcontext():
            return {
                name.replace("_fsdp_wrapped_module.", ""): whole(p)
                for name, p in self.bare.named_parameters()
                if p.requires_grad or frozen
            }


def build(mode: str, seed: int = 0) -> Run:
    """The ragged model in a layout, the same weights on all ranks."""
    torch.manual_seed(seed)
    bare = Ragged()
    if mode.endswith("_bf16"):
        bare = bare.bfloat16()
    target: nn.Module = bare
    unsynced: list[nn.Parameter] = []
    if mode in FSDP1:
        target, unsynced = wrap_fsdp1(bare, mode)
    elif mode.startswith("fsdp2"):
        mesh = init_device_mesh("cpu", (world(),))
        policy: dict[str, Any] = {}
        if mode == "fsdp2_mixed":
            policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
        # fully_shard refuses strided and 0-d parameters; its users leave them replicated.
        unsynced = [bare.transposed, bare.conv.weight, bare.scalar]
        for block in bare.blocks:
            fully_shard(block, mesh=mesh, **policy)
        fully_shard(bare, mesh=mesh, ignored_params=set(unsynced), **policy)
    elif mode.startswith("ddp"):
        target = DistributedDataParallel(bare)
    elif mode != "plain":
        raise ValueError(mode)
    trainable = [p for p in bare.parameters() if p.requires_grad]
    return Run(target, bare, torch.optim.AdamW(trainable, lr=1e-2), unsynced)


def wrap_fsdp1(bare: Ragged, mode: str) -> tuple[FSDP, list[nn.Parameter]]:
    settings = {"use_orig_params": True, **FSDP1[mode]}
    # FSDP1 refuses 0-d parameters, and where it shows flat ones, frozen among trainable ones.
    unsynced = [bare.scalar]
    ignored = unsynced if settings["use_orig_params"] else [*unsynced, bare.frozen]
    if "hybrid" in mode:
        axes = ("replicate", "shard")
        settings["device_mesh"] = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=axes)
    target = FSDP(
        bare,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        ignored_states=ignored,
        device_id=torch.device("cpu"),
        **settings,
    )
    return target, unsynced


def reference_step(average: dict[str, Tensor], now: dict[str, Tensor], weight: float) -> None:
    """The loop every textbook has, on gathered fp32 tensors."""
    for name, value in now.items():
        average[name].lerp_(value.float(), weight)


def whole(parameter: Tensor) -> Tensor:
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach().clone()


def as_float(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().clone() for name, tensor in tensors.items()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name}: {(got[name] - want[name]).abs().max()}"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
