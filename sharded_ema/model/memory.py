"""Where tensors lie in memory, so that views made of them are made again when that changes.

A parameter may get other memory, another shape or other strides under its own name (``.data``,
``set_``, ``resize_``, ``model.to(...)``). What is asked in every training step is asked of lists,
in C: a Python call for each of a thousand tensors would be felt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, itemgetter

from torch import Tensor

_dtype = attrgetter("dtype")


def pick(positions: Sequence[int], of: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """A function that takes some of ``of`` tensors; it can be copied and pickled."""
    if len(positions) == of:
        return _all
    return itemgetter(*positions) if len(positions) > 1 else partial(_few, tuple(positions))


def _all(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


def _few(positions: Sequence[int], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors[i] for i in positions]


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage behind a strided tensor is large enough; it may have been freed."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return not tensor.numel() or tensor.untyped_storage().nbytes() >= needed


class Layouts:
    """How some tensors lay when views of them were made.

    Args:
        tensors: those of which there are views, with elements.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._pointers = list(map(Tensor.data_ptr, tensors))
        self._numels = list(map(Tensor.numel, tensors))
        self._dtypes = list(map(_dtype, tensors))
        self._contiguous = list(map(Tensor.is_contiguous, tensors))
        # Of one in C order nothing more can change that a view of its memory would notice.
        self._strided = [
            (i, t.shape, t.stride())
            for i, (t, plain) in enumerate(zip(tensors, self._contiguous, strict=True))
            if not plain
        ]
        self._conjugated = [(i, t.is_conj()) for i, t in enumerate(tensors) if t.is_complex()]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether views that were made still are views of these tensors, element by element."""
        return (
            self._pointers == list(map(Tensor.data_ptr, tensors))
            and self._numels == list(map(Tensor.numel, tensors))
            and self._contiguous == list(map(Tensor.is_contiguous, tensors))
            and self._dtypes == list(map(_dtype, tensors))
            and all(
                tensors[i].shape == shape and tensors[i].stride() == strides
                for i, shape, strides in self._strided
            )
            and all(tensors[i].is_conj() == lazily for i, lazily in self._conjugated)
        )
