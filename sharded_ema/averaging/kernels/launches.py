"""The update in one launch for all tensors of a GPU, by a Triton kernel.

As on the CPU (``fused.py``) the kernel gets a table of addresses, which is made when the plan is.
It lies on the device; an update takes no memory, waits for nothing and costs the host one launch,
however many tensors there are. Triton comes with PyTorch where there is a GPU that it knows. Where
it is missing or fails, and for what it does not take, the batches of ``batches.py`` serve.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from sharded_ema.averaging.kernels.fused import is_laid_out_alike
from sharded_ema.model.devices import on
from sharded_ema.model.internals.pytorch import keeps_elements_elsewhere

logger = getLogger("sharded_ema")

MODULE = "sharded_ema.averaging.kernels.triton_lerp"

#: Types of devices whose averages go through the kernel. ROCm calls itself CUDA.
DEVICES = {"cuda"}
#: Bytes at whose multiples a shadow starts there, for accesses of 128 bits.
ALIGNMENT = 16
# Elements of a row: enough for the table to be small, and for all processors to have some.
ROW_NUMEL = 1 << 16
# The kinds of triton_lerp.py.
_LIVE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_SHADOW = (torch.float32, torch.float64)
_MOST_PROFILES = 8


@cache
def triton_module() -> Any | None:
    """The module of the kernel; ``None`` where there is no Triton."""
    try:
        return import_module(MODULE)
    except ImportError as error:
        logger.debug("averages on a GPU go through PyTorch's kernels, in many launches: %s", error)
        return None


@dataclass(frozen=True, slots=True)
class StepWeights:
    """Weights of many steps on a device, where a launch finds those of the step counted there.

    Attributes:
        counter: int64 of shape ``(2,)``: steps, and the one of the first row.
        rows: fp64 of shape ``(steps, profiles)``; a negative row says that nothing moves then.
        period: so many of the last rows are repeated behind them.
    """

    counter: Tensor
    rows: Tensor
    period: int

    def __len__(self) -> int:
        """Profiles."""
        return self.rows.shape[1]


def launch(
    table: Tensor,
    skipped: Tensor,
    weights: Sequence[float] | StepWeights,
    *,
    guard: bool,
    kinds: int,
    double: bool,
) -> None:
    """Start the kernel on every row of a table, on the current stream of its device.

    Args:
        double: whether shadows are in fp64.
    """
    module = triton_module()
    assert module is not None, "no table is made without a kernel"
    arguments: Sequence[Any]
    options: dict[str, Any] = {}
    if isinstance(weights, StepWeights):
        kernel, options = module.fused_lerp_by_step, {"DOUBLE": double}
        arguments = (weights.counter, weights.rows, len(weights.rows), weights.period)
    else:
        kernel = module.fused_lerp_double if double else module.fused_lerp
        # Rounded here as the device would, so that all that follows is rounded once.
        arguments = array("d" if double else "f", weights)
        arguments.extend([0.0] * (_MOST_PROFILES - len(weights)))
        if double:
            arguments = array("q", arguments.tobytes())
    with on(table.device):
        kernel[(len(table),)](
            table,
            skipped,
            *arguments,
            K=len(weights),
            GUARD=guard,
            KINDS=kinds,
            **options,
            num_warps=module.NUM_WARPS,
        )


class LaunchTable:
    """The tensors of one launch, as addresses. Whoever runs it knows that they are still right.

    Args:
        shadows: for each profile one tensor per parameter, all of one dtype.
        live: parameters of one device that :func:`takes` takes.

    Attributes:
        device: theirs.
        live: the parameters.
        tensors: all that a launch reads and writes, but for the counter.
        largest: what is still finite in a shadow, where some parameters are more precise.
    """

    def __init__(self, shadows: Sequence[Sequence[Tensor]], live: Sequence[Tensor]) -> None:
        self.device, self.live = live[0].device, list(live)
        dtype = shadows[0][0].dtype
        self._double, self._kinds = dtype is torch.float64, 0
        rows: list[list[int]] = []
        for parameter, *views in zip(live, *shadows, strict=True):
            address, targets = parameter.data_ptr(), [view.data_ptr() for view in views]
            size = parameter.element_size()
            aligned = not any(start % ALIGNMENT for start in (address, *targets))
            kind = 2 * _LIVE[parameter.dtype] + aligned
            self._kinds |= 1 << kind
            for start in range(0, parameter.numel(), ROW_NUMEL):
                numel = min(ROW_NUMEL, parameter.numel() - start)
                at = [target + dtype.itemsize * start for target in targets]
                rows.append([address + size * start, numel, kind, *at])
        self._table = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.tensors = [self._table, *live, *chain.from_iterable(shadows)]
        narrows = any(each.dtype.itemsize > dtype.itemsize for each in live)
        self.largest = torch.finfo(dtype).max if narrows else None

    def try_out(self, by_step: StepWeights | None = None, *, guard: bool) -> str | None:
        """Compile the kernel and start it on nothing; what went wrong, if anything did."""
        module = triton_module()
        nothing = torch.zeros_like(self._table[:1])
        weights = [0.0] * (nothing.shape[1] - 3) if by_step is None else by_step
        try:
            self._launch(nothing, nothing, weights, guard=guard)
        except module.FAILURES as error:  # type: ignore[union-attr]
            logger.warning(
                "averages on %s go through PyTorch's kernels, in many launches, since Triton's "
                "does not work there: %s",
                self.device,
                error,
            )
            return str(error)
        return None

    def lerp(self, weights: Sequence[float] | StepWeights, skipped: Tensor | None) -> None:
        """Move every shadow. Nothing waits for the device.

        Args:
            weights: for each profile, here or on the device.
            skipped: int64 on the device, grows by the elements that are left alone because their
                parameter is NaN or Inf; ``None`` to leave out none.
        """
        counter = self._table if skipped is None else skipped
        self._launch(self._table, counter, weights, guard=skipped is not None)

    def _launch(
        self,
        table: Tensor,
        counter: Tensor,
        weights: Sequence[float] | StepWeights,
        *,
        guard: bool,
    ) -> None:
        launch(table, counter, weights, guard=guard, kinds=self._kinds, double=self._double)


def takes(live: Tensor, views: Sequence[Tensor]) -> bool:
    """Whether a parameter and its shadows can go through the kernel.

    Args:
        live: real numbers.
        views: its shadow in each profile.
    """
    return (
        live.device.type in DEVICES
        and 0 < len(views) <= _MOST_PROFILES
        and live.dtype in _LIVE
        and not live.is_neg()
        and not keeps_elements_elsewhere(live)
        and views[0].dtype in _SHADOW
        and all(v.device == live.device and v.dtype == views[0].dtype for v in views)
        and is_laid_out_alike(live, views)
    )
