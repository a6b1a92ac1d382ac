"""How PyTorch alone spreads a model over the ranks, and what the way asks of a training step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from language_model import blocks
from options import Options
from ranks import Ranks, RunError

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def parallelize(model: PreTrainedModel, options: Options, ranks: Ranks) -> nn.Module:
    """Wrap the model as ``--parallel`` says; sharding has a group for each block, one for the rest.

    Raises:
        RunError: the model cannot be cut for tensor parallelism.
    """
    if options.parallel == "none":
        return model
    if options.parallel == "ddp":
        return DistributedDataParallel(
            model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None
        )
    # The parameters, and with them optimizer and average, stay as they are: only the gathered
    # copies are bfloat16, and gradients are summed in float32.
    lowered = (torch.bfloat16, torch.float32) if options.dtype == "bfloat16" else (None, None)
    if options.parallel == "fsdp1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(block) for block in blocks(model)}),
            mixed_precision=MixedPrecision(*lowered),
            use_orig_params=True,
            device_id=ranks.device,
            # With a mesh the training state is made of DTensors, as that of the other ways is.
            device_mesh=init_device_mesh(ranks.device.type, (ranks.size,)),
        )
    policy = MixedPrecisionPolicy(*lowered)
    mesh = _data_mesh(model, options, ranks)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def describe_layout(options: Options, ranks: Ranks) -> str:
    """The way and, where ranks form groups, their sizes."""
    groups = {
        "hsdp": f" ({ranks.size // options.shard_size} replicas x {options.shard_size} shards)",
        "tp": f" ({ranks.parts} data parallel x {ranks.copies} tensor parallel)",
    }
    return options.parallel + groups.get(options.parallel, "")


def _data_mesh(model: PreTrainedModel, options: Options, ranks: Ranks) -> DeviceMesh:
    """The ranks over which parameters are sharded, after tensor parallelism has cut its part."""
    kind, size = ranks.device.type, ranks.size
    if options.parallel == "hsdp":
        shape = (size // options.shard_size, options.shard_size)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    if options.parallel == "tp":
        shape = (ranks.parts, ranks.copies)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "tensor"))
        # Gradient norms are then summed over both axes at once, as PyTorch's own warning asks.
        mesh._flatten()
        parallelize_module(model.base_model, mesh["tensor"], tensor_plan(model, ranks.copies))
        return mesh["data"]
    return init_device_mesh(kind, (size,))


def tensor_plan(model: PreTrainedModel, size: int) -> dict[str, ParallelStyle]:
    """How ``size`` ranks share the matrices of each block: the plan of the model's own class.

    Embeddings, norms and head are no part of it; each rank computes them whole.

    Raises:
        RunError: the model has no such plan, or its heads or columns do not divide.
    """
    config = model.config
    plan = getattr(config, "base_model_tp_plan", None) or {}
    unknown = sorted({style for style in plan.values() if style not in _STYLES})
    if unknown or not plan:
        what = f"a plan with {', '.join(unknown)}" if unknown else "no plan"
        raise RunError(
            f"--parallel tp: {config.model_type} has {what} for tensor parallelism; "
            f"{' and '.join(_STYLES)} linears are supported"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(config, name, size)
        if number % size:
            raise RunError(f"--tp-size {size} does not divide the model's {name}, {number}")
    return {pattern: _STYLES[style]() for pattern, style in plan.items()}


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Context of one micro-batch: gradients are exchanged only in the ``last`` of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)) and not last:
        return model.no_sync()
    return nullcontext()


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Scale all gradients so that their common norm is at most ``limit``; the norm before."""
    if isinstance(model, FullyShardedDataParallel):
        return model.clip_grad_norm_(limit)
    # PyTorch combines norms only within one mesh; tensor parallelism has two.
    meshes: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            meshes.setdefault(mesh, []).append(parameter)
    norms = []
    for group in meshes.values():
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in meshes.values():
        nn.utils.clip_grads_with_norm_(group, limit, total)
    return total
