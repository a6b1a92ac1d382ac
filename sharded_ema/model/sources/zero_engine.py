"""Which DeepSpeed engines are supported, and the source that reads each.

DeepSpeed is never imported here: an engine that exists has brought it along.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from sharded_ema.errors import BindError, EMAWarning, UnsupportedLayoutError
from sharded_ema.model.inventory import Inventory, ShardSource, take_inventory
from sharded_ema.model.sources.deepspeed import Zero3Source, Zero12Source, is_parameter
from sharded_ema.model.sources.zero_stage0 import Zero0Source

#: The oldest DeepSpeed that the tests ran on.
OLDEST = (0, 19, 8)

_PARTITIONED: dict[str, type[Zero12Source] | type[Zero3Source]] = {
    "DeepSpeedZeroOptimizer": Zero12Source,
    "BF16_Optimizer": Zero12Source,
    "DeepSpeedZeroOptimizer_Stage3": Zero3Source,
}
_REPLICATED = ("FP16_Optimizer", "FP16_UnfusedOptimizer")


def make_engine_source(
    engine: Any,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    buffers: str,
    shard_replicas: bool,
) -> ShardSource:
    """The source for an engine, by the class of its optimizer.

    Raises:
        UnsupportedLayoutError: DeepSpeed's version, its optimizer, or something else of the engine
            is not supported; the message names it.
        BindError: a parameter cannot be averaged.
    """
    _refuse_version()
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    zero_stage = engine.zero_optimization_stage()
    if name not in (*_PARTITIONED, *_REPLICATED) and not (
        isinstance(optimizer, Optimizer) and zero_stage == 0
    ):
        raise UnsupportedLayoutError(
            f"the engine's optimizer is a {name} (ZeRO stage {zero_stage}); supported are "
            f"{', '.join((*_PARTITIONED, *_REPLICATED))} and a torch optimizer without ZeRO"
        )
    _refuse_storage(engine)
    inventory = take_inventory(engine.module, include, exclude, buffers)
    _refuse_experts(inventory)
    trained = {id(p) for group in _parameter_groups(optimizer) for p in group}
    _set_aside_untrained(inventory, trained)
    if name in _PARTITIONED:
        return _PARTITIONED[name](engine, inventory)
    return Zero0Source(engine, inventory, shard_replicas=shard_replicas)


def _parameter_groups(optimizer: Any) -> list[list[Any]]:
    """The parameters of the model that the optimizer trains, by its own groups."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [group["params"] for group in optimizer.param_groups]


def refuse_partitioned(inventory: Inventory) -> None:
    """Refuse the module inside a DeepSpeed engine: only the engine leads to the masters.

    Raises:
        BindError: see above.
    """
    for named in (*inventory.averaged, *inventory.frozen, *inventory.excluded):
        if hasattr(named.tensor, "ds_id") or hasattr(named.tensor, "_hp_mapping"):
            raise BindError(
                f"parameter {named.fqn} belongs to DeepSpeed; pass the engine that "
                "deepspeed.initialize returned, not the module inside it"
            )


def _refuse_version() -> None:
    version = getattr(sys.modules.get("deepspeed"), "__version__", "0 (not imported)")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST:
        raise UnsupportedLayoutError(
            f"DeepSpeed {version} is not supported: the oldest version that this library was "
            f"tested with is {'.'.join(map(str, OLDEST))}"
        )


def _refuse_storage(engine: Any) -> None:
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(
        optimizer, "params_in_nvme_and_cpu", False
    ):
        raise UnsupportedLayoutError(
            "the engine keeps weights or optimizer state on NVMe, where an update cannot reach "
            'them; offload to "cpu" instead'
        )


def _refuse_experts(inventory: Inventory) -> None:
    for named in (*inventory.averaged, *inventory.frozen, *inventory.excluded):
        if not getattr(named.tensor, "allreduce", True):
            raise UnsupportedLayoutError(
                f"parameter {named.fqn} is an expert of DeepSpeed's MoE, which is not supported"
            )


def _set_aside_untrained(inventory: Inventory, trained: set[int]) -> None:
    """Treat as frozen what no parameter group holds, because it never moves."""
    idle = [n for n in inventory.averaged if is_parameter(n) and id(n.tensor) not in trained]
    if not idle:
        return
    inventory.averaged = [n for n in inventory.averaged if n not in idle]
    inventory.frozen += idle
    names = [n.fqn for n in idle]
    if not any(map(is_parameter, inventory.averaged)):
        raise BindError(
            f"the engine's optimizer holds none of the {len(names)} trainable parameters, among "
            f"them {names[:3]}; pass model_parameters to deepspeed.initialize"
        )
    warnings.warn(
        f"{len(names)} trainable parameters are in no parameter group of the engine, among them "
        f"{names[:3]}; they never move and are stored as frozen ones are",
        EMAWarning,
        stacklevel=5,
    )
