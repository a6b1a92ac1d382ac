"""A model that is ragged on purpose, in every layout, and a reference that cannot share our bugs.

Sizes 1, 2, 3, 5, 7 and 10 over 2 to 4 ranks give uneven and empty shards; there are tied, frozen,
strided and 0-d parameters, and buffers of several kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

try:
    from torch.distributed._composable.replicate_with_fsdp import replicate
except ImportError:
    replicate = None

# Every layout, with the numbers of ranks that it can have here.
WORLDS: dict[str, tuple[int, ...]] = {
    "fsdp2": (2, 3, 4),
    "fsdp2_mixed": (2, 3, 4),
    "fsdp2_bf16": (2, 3, 4),
    "fsdp2_dim1": (2, 3),
    "ddp": (2, 3, 4),
    "ddp_bf16": (2, 3, 4),
    "replicate": (2, 3),
    "hsdp": (4,),
    "hsdp_whole": (4,),
    "tp": (2,),
    "tp_fsdp2": (4,),
    "ep_fsdp2": (4,),
    "fsdp1": (2, 3, 4),
    "fsdp1_flat": (2, 3, 4),
    "fsdp1_grad_op": (2, 3),
    "fsdp1_no_shard": (2, 3),
    "fsdp1_mixed": (2, 3),
    "fsdp1_bf16": (2, 3),
    "fsdp1_hybrid": (4,),
    "fsdp1_hybrid_flat": (4,),
}
FSDP1: dict[str, dict[str, Any]] = {
    "fsdp1": {"sharding_strategy": ShardingStrategy.FULL_SHARD},
    "fsdp1_flat": {"use_orig_params": False},
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
MODES = tuple(WORLDS)

# DeepSpeed engines that every test of the average and of swaps runs on.
ROUND_ROBIN = {"zero": {"round_robin_gradients": True}}
OFFLOAD = {
    "zero": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}
# World size, stage, precision, and what else the engine is made with.
PLAIN_ENGINES = [(2, stage, precision, {}) for stage in range(4) for precision in ("fp32", "bf16")]
ENGINES: list[tuple[int, int, str, dict[str, Any]]] = [
    *PLAIN_ENGINES,
    (2, 1, "bf16", ROUND_ROBIN),
    (2, 2, "bf16", ROUND_ROBIN),
    (4, 1, "fp32", ROUND_ROBIN),
    (4, 1, "bf16", ROUND_ROBIN),
    (4, 3, "fp32", {}),
    (4, 3, "bf16", {}),
    (4, 0, "bf16", {}),
    (2, 1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),  # BF16_Optimizer
    (2, 1, "bf16", OFFLOAD),
    (2, 2, "bf16", OFFLOAD),
    (2, 3, "bf16", OFFLOAD),
    (2, 3, "bf16", {"zero": {"sub_group_size": 40}}),
    (2, 3, "bf16", {"zero": {"stage3_param_persistence_threshold": 0}}),
    (2, 3, "bf16", {"zero": {"offload_param": {"device": "cpu"}}}),
    (2, 3, "bf16", {"zero_init": True}),
    (4, 3, "bf16", {"zero": {"zero_hpz_partition_size": 2}}),
    (2, 0, "fp16", {}),
    (2, 1, "fp16", {}),
    (2, 3, "fp16", {}),
]

#: Layouts that the PyTorch at hand cannot make, with the reason.
MISSING = {} if replicate else {"replicate": "this PyTorch has no replicate() made of FSDP2"}


def sizes(mode: str, wanted: Sequence[int] = (2, 3, 4)) -> list[int]:
    """Those of the wanted numbers of ranks that a mode can have, or the most that it can."""
    return [n for n in wanted if n in WORLDS[mode]] or [max(WORLDS[mode])]


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    """All experts see all tokens; expert parallelism gives each rank some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 10, 2) / 10)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not isinstance(weight, DTensor):
            return torch.einsum("bi,eio->bo", x, weight)
        mine = torch.einsum("bi,eio->bo", x, weight.to_local())
        return DTensor.from_local(mine, weight.device_mesh, [Partial()]).full_tensor()


class Ragged(nn.Module):
    #: 0-d and strided parameters, where the framework can train them.
    odd_tensors = True

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(7, 10)
        self.blocks = nn.ModuleList([Block(10, 5), Block(10, 3)])
        self.out = nn.Linear(10, 2)
        self.experts = Experts()
        self.tied = nn.Linear(7, 10, bias=False)
        self.tied.weight = self.inp.weight
        self.one = nn.Parameter(torch.full((1,), 1.5))
        scalar, transposed = torch.tensor(0.5), torch.randn(5, 2).t() / 5
        self.conv = nn.Conv2d(3, 2, 2)
        if self.odd_tensors:
            weight = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
            self.conv.weight.data = weight
        else:
            scalar, transposed = scalar.view(1), transposed.contiguous()
        self.scalar = nn.Parameter(scalar)
        self.transposed = nn.Parameter(transposed)
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
        h = self.experts(h) + self.out(h) * self.one + scalar + h[:, :5] @ skew
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
        stream: which data this rank sees; the same on the ranks of one tensor-parallel group.
        options: for the ShardedEMA.
    """

    target: nn.Module
    bare: Ragged
    optimizer: torch.optim.Optimizer
    unsynced: list[nn.Parameter]
    stream: int
    options: dict[str, Any]

    def step(self, index: int, *, backward_only: bool = False) -> float:
        """One optimizer step on data that depends on the stream and ``index`` alone."""
        generator = torch.Generator().manual_seed(1000 * index + self.stream)
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
        """Full parameters by bare name: the trainable ones, or all."""
        for module in self.bare.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        is_fsdp1 = isinstance(self.target, FSDP)
        with FSDP.summon_full_params(self.target, writeback=False) if is_fsdp1 else nullcontext():
            return all_whole(
                {
                    name.replace("_fsdp_wrapped_module.", ""): p
                    for name, p in self.bare.named_parameters()
                    if p.requires_grad or frozen
                }
            )


def build(mode: str, seed: int = 0) -> Run:
    """The ragged model in a layout, the same weights on all ranks."""
    torch.manual_seed(seed)
    bare = Ragged()
    if mode.endswith("_bf16"):
        bare = bare.bfloat16()
    target: nn.Module = bare
    # fully_shard refuses strided and 0-d parameters; its users leave them replicated.
    unsynced = [bare.transposed, bare.conv.weight, bare.scalar]
    stream = rank()
    if mode.startswith("fsdp2") or mode == "replicate":
        shard(bare, init_device_mesh("cpu", (world(),)), unsynced, mode)
    elif mode.startswith("hsdp"):
        axes = ("replicate", "shard")
        shard(bare, init_device_mesh("cpu", (2, 2), mesh_dim_names=axes), unsynced, mode)
    elif mode == "tp":
        unsynced += split_layers(bare, init_device_mesh("cpu", (2,)))
        stream = 0
    elif mode == "tp_fsdp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        split_layers(bare, mesh["tp"])
        shard(bare, mesh["dp"], unsynced, mode)
        stream = mesh.get_local_rank("dp")
    elif mode == "ep_fsdp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        weight = distribute_tensor(bare.experts.weight.detach(), mesh["ep"], [ShardPlacement(0)])
        bare.experts.weight = nn.Parameter(weight)
        fully_shard(bare.experts, mesh=mesh["dp"])
        shard(bare, init_device_mesh("cpu", (4,)), unsynced, mode)
        stream = mesh.get_local_rank("dp")
    elif mode in FSDP1:
        target, unsynced = flatten(bare, mode), [bare.scalar]
    elif mode.startswith("ddp"):
        target, unsynced = DistributedDataParallel(bare), []
    elif mode == "plain":
        unsynced = []
    else:
        raise ValueError(mode)
    trainable = [p for p in bare.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    options = {"shard_replicas": False} if mode.endswith("_whole") else {}
    return Run(target, bare, optimizer, unsynced, stream, options)


def shard(bare: Ragged, mesh: DeviceMesh, ignored: list[nn.Parameter], mode: str) -> None:
    """``fully_shard`` over ``mesh``, or ``replicate``, which is made of it."""
    wrap: Callable[..., Any] = replicate if mode == "replicate" else fully_shard
    options: dict[str, Any] = {"mesh": mesh}
    if mode == "fsdp2_mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if mode == "fsdp2_dim1":  # along which it wants even shards
        options["shard_placement_fn"] = lambda p: ShardPlacement(
            int(p.dim() > 1 and p.shape[1] % world() == 0)
        )
    for block in bare.blocks:
        wrap(block, **options)
    wrap(bare, ignored_params=set(ignored), **options)


def split_layers(bare: Ragged, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Tensor parallelism of all linear layers; returns what is left replicated as plain tensors."""
    plan: dict[str, ParallelStyle] = {"out": RowwiseParallel(input_layouts=Replicate())}
    for name in ("inp", "tied"):
        plan[name] = ColwiseParallel(output_layouts=Replicate())
    for index in range(len(bare.blocks)):
        # Local outputs of an uneven layer would be taken for those of an even one.
        plan[f"blocks.{index}.up"] = ColwiseParallel(use_local_output=False)
        plan[f"blocks.{index}.down"] = RowwiseParallel()
    parallelize_module(bare, mesh, plan)
    bare.tied.weight = bare.inp.weight
    return [bare.one, bare.conv.bias, bare.experts.weight]


def flatten(bare: Ragged, mode: str) -> FSDP:
    """FullyShardedDataParallel (FSDP1)."""
    options = {"use_orig_params": True, **FSDP1[mode]}
    # It refuses 0-d parameters and, with flat ones for the optimizer, frozen among trainable ones.
    ignored = [bare.scalar] if options["use_orig_params"] else [bare.scalar, bare.frozen]
    if "hybrid" in mode:
        axes = ("replicate", "shard")
        options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
    return FSDP(
        bare,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        ignored_states=ignored,
        device_id=torch.device("cpu"),
        **options,
    )


def reference_step(average: dict[str, Tensor], now: dict[str, Tensor], weight: float) -> None:
    """The loop every textbook has, on gathered fp32 tensors."""
    for name, value in now.items():
        average[name].lerp_(value.float(), weight)


def whole(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter.detach().clone()
    if not any(isinstance(placement, _StridedShard) for placement in parameter.placements):
        return parameter.full_tensor().detach().clone()
    return all_whole({"": parameter})[""]  # PyTorch 2.8 puts uneven ones together wrongly


def all_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``whole`` of each, in one exchange among all ranks, which have the same names."""
    sharded = [tensor for tensor in tensors.values() if isinstance(tensor, DTensor)]
    everyone = exchange([tensor.to_local() for tensor in sharded]) if sharded else []
    pieces = iter(zip(*everyone, strict=True))
    return {
        name: put_together(tensor, next(pieces)) if isinstance(tensor, DTensor) else whole(tensor)
        for name, tensor in tensors.items()
    }


def put_together(tensor: DTensor, pieces: Sequence[Tensor]) -> Tensor:
    """A tensor out of its pieces on all ranks: axis by axis, the one that cut last first.

    That is the last axis, or the first where a placement says that it has cut what another had cut.
    """
    placements, grid = tensor.placements, tensor.device_mesh.mesh
    strided = any(isinstance(placement, _StridedShard) for placement in placements)
    found = {tuple(at): pieces[int(grid[tuple(at)])] for at in (grid >= 0).nonzero().tolist()}
    for axis in range(grid.dim()) if strided else reversed(range(grid.dim())):
        rows: dict[tuple[int, ...], list[Tensor]] = {}
        for at, piece in sorted(found.items()):
            rows.setdefault((*at[:axis], 0, *at[axis + 1 :]), []).append(piece)
        placement = placements[axis]
        found = {
            at: row[0] if placement.is_replicate() else torch.cat(row, placement.dim)  # type: ignore
            for at, row in rows.items()
        }
    (full,) = found.values()
    return full.clone()


def exchange(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """These tensors as every rank has them. As bytes: to pickle tensors takes ten times as long."""
    mine = [
        (t.detach().reshape(-1).view(torch.uint8).numpy().tobytes(), t.dtype, t.shape)
        for t in tensors
    ]
    everyone: list[Any] = [None] * world()
    dist.all_gather_object(everyone, mine)
    return [
        [
            torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
            if data
            else torch.empty(shape, dtype=dtype)
            for data, dtype, shape in theirs
        ]
        for theirs in everyone
    ]


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
