"""Where a DeepSpeed engine keeps weights and masters. Seen in DeepSpeed 0.19.8.

DeepSpeed flattens parameters into buffers and gives each rank a piece of those, its *master
partition*, cut without regard to where parameters end. The 16-bit weights of the model are the
masters, rounded. What this relies on:

- The order of parameters in a buffer comes from the optimizer's own lists. The public getters
  assume another one under ``round_robin_gradients`` and return wrong data (DeepSpeed 0.19.8).
- Padding lies between and behind the parameters, uninitialised in stage 3.
- Without ZeRO the 16-bit optimizers keep an fp32 master of each parameter, in lists or in one flat
  buffer a group.

None of it is a promise, so who uses it compares every slice with the parameter that it is said to
belong to. DeepSpeed is never imported here: an engine that exists has brought it along.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_ema.errors import UnsupportedLayoutError
from sharded_ema.model.internals.members import Members
from sharded_ema.model.layout import FlatRange

SEEN = "DeepSpeed 0.19.8"
#: The oldest DeepSpeed that the tests ran on.
OLDEST = (0, 19, 8)

ENGINE = Members(
    "a DeepSpeed engine",
    SEEN,
    (
        "module", "optimizer", "zero_optimization_stage", "seq_data_parallel_group",
        "mp_world_size", "was_step_applied", "skipped_steps", "global_steps",
    ),
)  # fmt: skip
PIPELINE = Members("a DeepSpeed pipeline engine", SEEN, ("grid", "train_batch"))
FLAT = Members(
    "DeepSpeed's optimizer of ZeRO 1 and 2",
    SEEN,
    ("real_dp_process_group", "update_lp_params"),
)
STAGE3 = Members(
    "DeepSpeed's optimizer of ZeRO 3",
    SEEN,
    (
        "fp16_groups", "fp32_partitioned_groups_flat",
        "checkpoint_event_prologue", "checkpoint_event_epilogue",
    ),
)  # fmt: skip
PIECE = Members(
    "a parameter under ZeRO 3",
    SEEN,
    ("ds_tensor", "ds_numel", "ds_shape", "ds_process_group", "partition_numel"),
)

PARTITIONED = ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3")
REPLICATED = ("FP16_Optimizer", "FP16_UnfusedOptimizer")


def is_engine(target: object) -> bool:
    """Whether something is what ``deepspeed.initialize`` returns."""
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(target).__mro__)


def check_engine(engine: Any) -> None:
    """Look for what is used here.

    Raises:
        FrameworkVersionError: something is missing.
        UnsupportedLayoutError: a version that was never tried, an optimizer that is not known, or
            weights on NVMe.
    """
    version = getattr(sys.modules.get("deepspeed"), "__version__", "0 (not imported)")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST:
        raise UnsupportedLayoutError(
            f"DeepSpeed {version} is not supported: the oldest version that this library was "
            f"tested with is {'.'.join(map(str, OLDEST))}"
        )
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    name = type(optimizer).__name__
    known = (*PARTITIONED, *REPLICATED)
    if name not in known and not (isinstance(optimizer, Optimizer) and stage == 0):
        raise UnsupportedLayoutError(
            f"the engine's optimizer is a {name} (ZeRO stage {stage}); supported are "
            f"{', '.join(known)} and a torch optimizer without ZeRO"
        )
    ENGINE.check(engine)
    if getattr(optimizer, "swap_optimizer", False) or getattr(
        optimizer, "params_in_nvme_and_cpu", False
    ):
        raise UnsupportedLayoutError(
            "the engine keeps weights or optimizer state on NVMe, where an update cannot reach "
            'them; offload to "cpu" instead'
        )


def trained_parameters(optimizer: Any) -> set[int]:
    """Ids of the model's parameters that the engine's optimizer trains."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, name):
            return {id(p) for group in getattr(optimizer, name) for p in group}
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def is_of_an_engine(parameter: Tensor) -> bool:
    """Whether DeepSpeed has taken over a parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter is an expert of DeepSpeed's MoE."""
    return not getattr(parameter, "allreduce", True)


def inner_optimizers(engine: Any) -> list[Optimizer]:
    """The torch optimizers that step: the engine's own, the one inside ZeRO's, that of a partial
    offload."""
    wrapper = engine.optimizer
    inner = (wrapper, *(getattr(wrapper, n, None) for n in ("optimizer", "backup_optimizer")))
    return [optimizer for optimizer in inner if isinstance(optimizer, Optimizer)]


class Stage:
    """The part of a model that one engine trains: all of it, or the layers of a pipeline stage.

    Parameters of stages have names that are unique in the whole model, but for tied layers, which
    several stages hold and train alike.

    Args:
        engine: a DeepSpeed engine.

    Attributes:
        replicas: the group whose ranks share what this rank holds, or hold it whole.
        ranks: global ranks of the whole model.
        is_pipeline: whether other ranks may train other layers.

    Raises:
        UnsupportedLayoutError: the engine slices layers over ranks (tensor parallelism).
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.replicas: dist.ProcessGroup = engine.seq_data_parallel_group
        self.ranks = dist.get_process_group_ranks(self.replicas)
        self.is_pipeline = hasattr(engine, "is_pipe_parallel")
        sliced = engine.mp_world_size
        if self.is_pipeline:
            PIPELINE.check(engine)
            self.ranks = list(range(dist.get_world_size()))
            sliced = engine.grid.get_slice_parallel_world_size()
        if sliced > 1:
            raise UnsupportedLayoutError(
                f"the engine slices layers over {sliced} ranks; DeepSpeed's tensor parallelism is "
                "not supported"
            )

    def is_borrowed(self, path: str) -> bool:
        """Whether an earlier pipeline stage holds the tensor, too, and writes it."""
        ties = self._engine.module.tied_comms if self.is_pipeline else {}
        return any(
            path.startswith(f"tied_modules.{key}.") and min(tie["ranks"]) != dist.get_rank()
            for key, tie in ties.items()
        )

    def writes_whole(self, path: str) -> bool:
        """Whether of those that hold a tensor whole this rank is the one to write it."""
        return dist.get_rank(self.replicas) == 0 and not self.is_borrowed(path)


# ---------------------------------------------------------------------- ZeRO 1, 2 and 3


@dataclass(frozen=True, slots=True)
class Partition:
    """Where this rank's piece of one parameter lies.

    Attributes:
        buffer: which of the optimizer's master partitions.
        offset: first element there.
        range: elements of the parameter in C order; empty if other ranks hold it all.
    """

    buffer: int
    offset: int
    range: FlatRange


class Partitions(Protocol):
    """The master partitions of one optimizer, and the weights that they become.

    Attributes:
        kind: name of the layout.
    """

    kind: str

    def layout(self) -> dict[int, Partition]:
        """Where every parameter of the optimizer lies, by ``id``."""
        ...

    def masters(self) -> Sequence[Tensor]:
        """This rank's master partitions: 1-D, fp32 unless the user chose bf16 masters."""
        ...

    def weights(self, parameter: Tensor, partition: Partition) -> Tensor:
        """The memory of the model's weights that this rank may overwrite (1-D)."""
        ...

    def seen(self, parameter: Tensor, partition: Partition) -> Tensor:
        """What the model itself says those elements are (1-D)."""
        ...

    def rewrite(self, write: Callable[[], None]) -> None:
        """Let ``write`` overwrite this rank's weights, and hand them to all. Collective."""
        ...

    def refresh(self, write_masters: Callable[[], None]) -> None:
        """Make the model's weights from the masters again. Collective.

        Args:
            write_masters: copies this rank's masters over its weights.
        """
        ...


def partitions_of(engine: Any) -> Partitions:
    """The master partitions of a ZeRO engine."""
    if type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        return Stage3Partitions(engine)
    return FlatPartitions(engine)


class FlatPartitions:
    """Stages 1 and 2, and ``BF16_Optimizer``: one flat buffer for each parameter group."""

    kind = "zero-1/2"

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        FLAT.check(engine.optimizer)
        # Attributes of the optimizer: groups, partitions of the weights, masters.
        self._groups, self._weights, self._masters = (
            ("bf16_groups", "bf16_partitioned_groups", "fp32_groups_flat_partition")
            if hasattr(engine.optimizer, "bf16_groups")
            else (
                "bit16_groups",
                "parallel_partitioned_bit16_groups",
                "single_partition_of_fp32_groups",
            )
        )
        Members("DeepSpeed's optimizer", SEEN, (self._groups, self._weights, self._masters)).check(
            engine.optimizer
        )

    @property
    def _optimizer(self) -> Any:
        return self._engine.optimizer  # its lists are read anew at each use

    def layout(self) -> dict[int, Partition]:
        optimizer = self._optimizer
        found = {}
        for buffer, group in enumerate(getattr(optimizer, self._groups)):
            # The order in the buffer, which is not that of the group under round_robin_gradients.
            orders = getattr(optimizer, "round_robin_bit16_groups", None)
            order = group if orders is None else orders[buffer]
            offsets = getattr(optimizer, "round_robin_bit16_offsets", None)
            starts = _running_sums(order) if offsets is None else offsets[buffer]
            size = self.masters()[buffer].numel()
            low = self._rank_in(buffer) * size
            for parameter, start in zip(order, starts, strict=True):
                first = min(max(low - start, 0), parameter.numel())
                last = min(max(low + size - start, first), parameter.numel())
                span = FlatRange(first, last)
                found[id(parameter)] = Partition(buffer, max(start - low, 0), span)
        return found

    def _rank_in(self, buffer: int) -> int:
        return dist.get_rank(self._optimizer.real_dp_process_group[buffer])

    def masters(self) -> Sequence[Tensor]:
        masters: Sequence[Tensor] = getattr(self._optimizer, self._masters)
        return masters

    def _weight_partitions(self) -> list[Tensor]:
        """This rank's piece of every group's flat weights."""
        groups = getattr(self._optimizer, self._weights)
        return [group[self._rank_in(buffer)] for buffer, group in enumerate(groups)]

    def weights(self, parameter: Tensor, partition: Partition) -> Tensor:
        weights = self._weight_partitions()[partition.buffer]
        return weights.narrow(0, partition.offset, partition.range.numel)

    def seen(self, parameter: Tensor, partition: Partition) -> Tensor:
        span = partition.range
        return parameter.detach().reshape(-1)[span.start : span.stop]

    def rewrite(self, write: Callable[[], None]) -> None:
        write()
        # DeepSpeed's own refresh copies each master over the weights of this rank and gathers
        # them. With the weights in the masters' place only the gathering is left.
        masters = self.masters()
        setattr(self._optimizer, self._masters, self._weight_partitions())
        try:
            self._optimizer.update_lp_params()
        finally:
            setattr(self._optimizer, self._masters, masters)

    def refresh(self, write_masters: Callable[[], None]) -> None:
        self._optimizer.update_lp_params()


class Stage3Partitions:
    """Stage 3: every parameter is cut into equal 1-D pieces, the last ones padded."""

    kind = "zero-3"

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        STAGE3.check(engine.optimizer)
        for group in engine.optimizer.fp16_groups:
            for parameter in group:
                PIECE.check(parameter)

    def layout(self) -> dict[int, Partition]:
        found = {}
        for buffer, group in enumerate(self._engine.optimizer.fp16_groups):  # one a sub-group
            offset = 0
            for parameter in group:
                found[id(parameter)] = Partition(buffer, offset, piece_of(parameter))
                offset += parameter.partition_numel()
        return found

    def masters(self) -> Sequence[Tensor]:
        masters: Sequence[Tensor] = self._engine.optimizer.fp32_partitioned_groups_flat
        return masters

    def weights(self, parameter: Tensor, partition: Partition) -> Tensor:
        return piece_weights(parameter)

    def seen(self, parameter: Tensor, partition: Partition) -> Tensor:
        return piece_weights(parameter)

    # What is gathered here stays for training, even if it is an evaluation that swaps.
    @torch.inference_mode(False)
    @torch.no_grad()
    def rewrite(self, write: Callable[[], None]) -> None:
        # Gathered copies are dropped before, and made anew after the pieces have changed.
        self._engine.optimizer.checkpoint_event_prologue()
        write()
        self._engine.optimizer.checkpoint_event_epilogue()

    def refresh(self, write_masters: Callable[[], None]) -> None:
        self.rewrite(write_masters)


def is_in_pieces(parameter: Tensor) -> bool:
    """Whether ZeRO 3 has cut a parameter."""
    return hasattr(parameter, "ds_tensor")


def piece_of(parameter: Any) -> FlatRange:
    """Which elements of a stage-3 parameter this rank holds; the rest of its piece is padding."""
    size = parameter.partition_numel()
    first = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return FlatRange(first, min(first + size, parameter.ds_numel))


def piece_weights(parameter: Any) -> Tensor:
    """This rank's elements of a stage-3 parameter, without padding (1-D)."""
    weights: Tensor = parameter.ds_tensor.detach().view(-1)[: piece_of(parameter).numel]
    return weights


def _running_sums(parameters: Sequence[Tensor]) -> list[int]:
    sums = [0]
    for parameter in parameters:
        sums.append(sums[-1] + parameter.numel())
    return sums[:-1]


# ---------------------------------------------------------------------- without ZeRO


class ReplicatedMasters:
    """The fp32 masters of 16-bit parameters without ZeRO, which every rank holds whole."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        # Group, position in it and offset in its flat buffer of every parameter with a master.
        self._places: dict[int, tuple[int, int, int]] = {}
        for number, group in enumerate(getattr(engine.optimizer, "fp16_groups", ())):
            offset = 0
            for position, parameter in enumerate(group):
                self._places[id(parameter)] = (number, position, offset)
                offset += parameter.numel()

    def of(self, parameter: Tensor) -> Tensor | None:
        """The master of a parameter, in its shape; ``None`` if the optimizer trains it itself."""
        place = self._places.get(id(parameter))
        if place is None:
            return None
        group, position, offset = place
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "fp32_groups"):
            master: Tensor = optimizer.fp32_groups[group][position].detach()
            return master
        flat: Tensor = optimizer.fp32_groups_flat[group].detach()
        return flat.narrow(0, offset, parameter.numel()).view(parameter.shape)


def module_of(engine: Any) -> nn.Module:
    """The module inside an engine."""
    module: nn.Module = engine.module
    return module
