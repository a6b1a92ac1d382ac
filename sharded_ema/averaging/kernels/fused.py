"""The update in one pass over memory, by a C extension, for what lies on the CPU.

An update is bound by memory, and this moves the least that can be: each element of a parameter is
read once for all profiles, each of a shadow read and written once, and what is not finite is left
out and counted on the way. The extension is handed a table of addresses, which is made when the
plan is; that the addresses still are those of the tensors is asked before every update
(``watch.py``). Where the extension was not built, and for what it does not take, the batches of
``batches.py`` serve.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from itertools import chain
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from sharded_ema.model.internals.pytorch import keeps_elements_elsewhere
from sharded_ema.model.memory import has_memory

logger = getLogger("sharded_ema")

EXTENSION = "sharded_ema.averaging.kernels.fused_cpu"

# The kinds of fused_cpu.c: these, and as many again for a float64 shadow.
_LIVE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_SHADOW = {torch.float32: 0, torch.float64: len(_LIVE)}
_MOST_PROFILES = 64
_NUMEL = 2  # the column of it
# Instructions that PyTorch chose for this machine. With those it rounds as it does.
_LEVELS = {"AVX2": 1, "AVX512": 2}

# Not with the first plan: a process that was forked in between would take the threads of its
# parent, which it does not have, for those of its own PyTorch.
with suppress(ImportError):
    import_module(EXTENSION)


@cache
def extension() -> Any | None:
    """The compiled module; ``None`` where it was not built or does not load."""
    try:
        return import_module(EXTENSION)
    except ImportError as error:
        logger.debug(
            "averages on the CPU go through PyTorch's kernels, in several passes: %s", error
        )
        return None


class FusedTable:
    """The tensors of one pass, as addresses. Whoever runs it knows that they are still right.

    Args:
        shadows: for each profile one tensor per parameter.
        live: parameters that :func:`takes` takes.

    Attributes:
        num_rows: tensors, those as one that follow each other in memory.

    Raises:
        ImportError: the extension is not there.
    """

    def __init__(self, shadows: Sequence[Sequence[Tensor]], live: Sequence[Tensor]) -> None:
        found = extension()
        if found is None:
            raise ImportError(f"{EXTENSION} was not built")
        self._extension = found
        self._profiles = len(shadows)
        self._level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), 0)
        rows: list[list[int]] = []
        after: list[int] = []  # where a tensor lies that continues the last row
        start = 0
        for parameter, *views in zip(live, *shadows, strict=True):
            numel, size = parameter.numel(), views[0].element_size()
            kind = _LIVE[parameter.dtype] + _SHADOW[views[0].dtype]
            address, targets = parameter.data_ptr(), [view.data_ptr() for view in views]
            if after == [kind, address, *targets]:
                rows[-1][_NUMEL] += numel
            else:
                rows.append([address, start, numel, kind, *targets])
            after = [kind, address + numel * parameter.element_size()]
            after += [target + numel * size for target in targets]
            start += numel
        self.num_rows = len(rows)
        self._table = array("q", chain.from_iterable(rows))

    def lerp(self, weights: Sequence[float], *, guard: bool) -> int:
        """Move every shadow.

        Args:
            weights: for each profile.
            guard: leave elements alone whose parameter is NaN or Inf in the shadow's dtype.

        Returns:
            Elements left alone.
        """
        threads, values = torch.get_num_threads(), array("d", weights)
        skipped: int = self._extension.lerp(self._table, values, guard, threads, self._level)
        return skipped

    def is_finite(self) -> bool:
        """Whether all parameters are finite, also in the shadow's dtype."""
        found: int = self._extension.count_nonfinite(
            self._table, self._profiles, torch.get_num_threads(), self._level
        )
        return not found


def takes(live: Tensor, views: Sequence[Tensor]) -> bool:
    """Whether a parameter and its shadows can go through the extension.

    They lie on the CPU, in the same order and without gaps, so that a start and a number of
    elements say all.

    Args:
        live: real numbers.
        views: its shadow in each profile.
    """
    return (
        0 < len(views) <= _MOST_PROFILES
        and live.device.type == "cpu"
        and live.dtype in _LIVE
        and views[0].dtype in _SHADOW
        and not live.is_neg()
        and not keeps_elements_elsewhere(live)
        and all(view.device == live.device for view in views)
        and is_laid_out_alike(live, views)
    )


def is_laid_out_alike(live: Tensor, views: Sequence[Tensor]) -> bool:
    """Whether an address and a number of elements say all of a parameter and of its shadows."""
    return all(map(_is_readable, (live, *views))) and (
        all(t.is_contiguous() for t in (live, *views))
        or (_is_gapless(live) and all(_order(view) == _order(live) for view in views))
    )


def _is_readable(tensor: Tensor) -> bool:
    """Whether there are elements, and a kernel may read them where they lie."""
    return (
        tensor.layout is torch.strided
        and tensor.numel() > 0
        and has_memory(tensor)
        and tensor.data_ptr() % tensor.element_size() == 0
    )


def _order(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the dimensions in which there is anything to go."""
    return [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def _is_gapless(tensor: Tensor) -> bool:
    step = 1
    for size, stride in sorted(_order(tensor), key=lambda pair: pair[1]):
        if stride != step:
            return False
        step *= size
    return True
