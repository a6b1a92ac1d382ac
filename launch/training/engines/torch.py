"""Training by PyTorch alone: however it spreads the model, or in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
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

from sharded_ema import ShardedEMA
from training.model import InitialWeights, blocks, build_optimizer, parameter_groups
from training.options import Options, UsageError
from training.ranks import Ranks, RunError

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def group_sizes(flags: Mapping[str, Any], ranks: int, machine: int) -> dict[str, int]:
    """``shard_size`` and ``tp_size`` with their defaults; 1 where the way has no such groups.

    Args:
        flags: the parsed command line.
        ranks: processes of the run.
        machine: those of them on one machine.

    Raises:
        UsageError: a size that does not divide the ranks, or that the way does not have.
    """
    parallel, shard, tensor = flags["parallel"], flags["shard_size"], flags["tp_size"]
    if shard is not None and parallel != "hsdp":
        raise UsageError("--shard-size needs --parallel hsdp")
    if tensor is not None and parallel != "tp":
        raise UsageError("--tp-size needs --parallel tp")
    if parallel == "hsdp":
        if ranks < 4:
            raise UsageError(
                f"--parallel hsdp needs two groups of two ranks or more, but {ranks} were started; "
                "fsdp2 runs on any number"
            )
        # Within a machine communication is fast; on a single one, two replicas show the way.
        shard = shard or (machine if 1 < machine < ranks else ranks // 2)
        if not 1 < shard < ranks or ranks % shard:
            raise UsageError(
                f"--shard-size {shard} does not divide {ranks} ranks into two or more groups of "
                "two or more"
            )
    if parallel == "tp":
        tensor = tensor or 2
        if tensor < 2 or ranks % tensor:
            raise UsageError(
                f"--tp-size {tensor} does not divide {ranks} ranks into groups of two or more"
            )
    return {"shard_size": shard or 1, "tp_size": tensor or 1}


class TorchEngine:
    """A model wrapped as ``--parallel`` says; its training state is a stock DCP checkpoint."""

    saves_average = False

    def __init__(self, bare: PreTrainedModel, options: Options, ranks: Ranks) -> None:
        self._options = options
        self._ranks = ranks
        self.layout = _describe_layout(options, ranks)
        weights = InitialWeights(bare, options.seed, ranks.device)
        self.model = ranks.everywhere(lambda: _parallelize(bare, weights, options, ranks))
        # FSDP1 keeps the parameters, but their shapes no longer tell which are matrices.
        flat = isinstance(self.model, FullyShardedDataParallel)
        matrices = weights.matrices if flat else None
        self._optimizer = build_optimizer(parameter_groups(self.model, options, matrices), options)
        self._background = background_group(options)

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast where nothing else lowers the precision."""
        options = self._options
        sharded = options.parallel not in ("ddp", "none")
        if options.dtype == "bfloat16" and not options.pure_bf16 and not sharded:
            return torch.autocast(self._ranks.device.type, torch.bfloat16)
        return nullcontext()

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return _accumulating(self.model, last)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, rate: float) -> torch.Tensor | float | None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self._options.clip_norm:
            norm = _clip_gradients(self.model, self._options.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def attach(self, ema: ShardedEMA) -> None:
        ema.attach(self._optimizer)

    def gather(self) -> dict[str, torch.Tensor]:
        return gather_weights(self.model, self._ranks)

    def save(self, path: Path) -> Callable[[], None]:
        return save_state(path, self.model, self._optimizer, self._background)

    def load(self, path: Path) -> None:
        load_state(path, self.model, self._optimizer)


def _parallelize(
    model: PreTrainedModel, weights: InitialWeights, options: Options, ranks: Ranks
) -> nn.Module:
    """Fill the model and wrap it as ``--parallel`` says.

    Sharding has a group for each block and one for the rest, and shards each before the next is
    filled.

    Raises:
        RunError: the model cannot be cut for tensor parallelism.
    """
    if options.parallel in ("none", "ddp"):
        weights.fill_all()
        if options.parallel == "none":
            return model
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
            param_init_fn=weights.fill_around,
            # With a mesh the training state is made of DTensors, as that of the other ways is.
            device_mesh=init_device_mesh(ranks.device.type, (ranks.size,)),
        )
    policy = MixedPrecisionPolicy(*lowered)
    mesh, tensor = _meshes(options, ranks)
    plan = {} if tensor is None else tensor_plan(model, ranks.copies)
    names = {module: name for name, module in model.base_model.named_modules()}
    for part in weights.parts:
        weights.fill(part)
        if tensor is not None and part is not model:
            parallelize_module(part, tensor, _plan_of(names[part], plan))
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def _describe_layout(options: Options, ranks: Ranks) -> str:
    """The way and, where ranks form groups, their sizes."""
    groups = {
        "hsdp": f" ({ranks.size // options.shard_size} replicas x {options.shard_size} shards)",
        "tp": f" ({ranks.parts} data parallel x {ranks.copies} tensor parallel)",
    }
    return options.parallel + groups.get(options.parallel, "")


def _meshes(options: Options, ranks: Ranks) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The ranks over which parameters are sharded, and those among which a matrix is cut before."""
    kind, size = ranks.device.type, ranks.size
    if options.parallel == "hsdp":
        shape = (size // options.shard_size, options.shard_size)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard")), None
    if options.parallel == "tp":
        shape = (ranks.parts, ranks.copies)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "tensor"))
        # Gradient norms are then summed over both axes at once, as PyTorch's own warning asks.
        mesh._flatten()
        return mesh["data"], mesh["tensor"]
    return init_device_mesh(kind, (size,)), None


def _plan_of(name: str, plan: Mapping[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """What a plan has for the module of this name, relative to it."""
    above = name.split(".")
    found = {}
    for pattern, style in plan.items():
        levels = pattern.split(".")
        if all(map(fnmatchcase, above, levels)):
            found[".".join(levels[len(above) :])] = style
    return found


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


def _accumulating(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Context of one micro-batch: gradients are exchanged only in the ``last`` of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)) and not last:
        return model.no_sync()
    return nullcontext()


def _clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
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


def gather_weights(model: nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The whole model's state by name, on the first rank; on others nothing."""
    # On CPUs an offload copies nothing, and FSDP1 then hands out memory that it has freed.
    offload = ranks.device.type != "cpu"
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    if not ranks.first:
        return {}
    # DDP hands out the live weights.
    return {name: value.to("cpu", copy=True) for name, value in state.items()}


def background_group(options: Options) -> dist.ProcessGroup | None:
    """A group for saves beside the training; None where saves are waited for.

    A thread that saves needs one of its own: in the group of the training its collectives would
    meet those of the steps.
    """
    if not options.async_save or not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo")


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    background: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Model and optimizer, to ``path/train``: with a group, copied now and written in a thread.

    Returns:
        What waits until it is written.
    """
    state, target = _state(model, optimizer), path / "train"
    if background is None:
        with _quiet_alone() as alone, _named_failure(target, "written"):
            dcp.save(state, checkpoint_id=target, no_dist=alone)
        return lambda: None
    future = dcp.async_save(state, checkpoint_id=target, process_group=background)
    assert isinstance(future, Future)  # no stager was given that would answer otherwise

    def wait() -> None:
        with _named_failure(target, "written"):
            future.result()

    return wait


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Model and optimizer from ``path/train``, on whatever number of ranks.

    Giving a fresh optimizer its state takes a step of no effect, which an average attached
    before would count.

    Raises:
        RunError: it cannot be loaded.
    """
    state = _state(model, optimizer)
    with _quiet_alone() as alone, _named_failure(path / "train", "loaded"):
        dcp.load(state, checkpoint_id=path / "train", no_dist=alone)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _named_failure(path: Path, done: str) -> Iterator[None]:
    """DCP's failure as one line; it has one error for each rank that failed."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise RunError(f"{path} cannot be {done}: {first!r}") from None


@contextmanager
def _quiet_alone() -> Iterator[bool]:
    """Whether this is a run of one process; DCP warns of that even where it was told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield not dist.is_initialized()
