"""Where tensors lie in memory, so that views made of them are made again when that changes.

A parameter may get other memory, another shape or other strides under its own name (``.data``,
``set_``, ``resize_``, ``model.to(...)``). What is asked in every training step is asked of lists,
in C: a Python call for each of a thousand tensors would be felt.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter, itemgetter

import torch
from torch import Tensor

# Bytes of a large page of most systems, below which there is nothing to gain.
_LARGE_PAGE = 1 << 21

_LARGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)

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


def one_of_each_storage(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of those with elements that share memory, the last."""
    return list({t.untyped_storage().data_ptr(): t for t in tensors if t.numel()}.values())


def allocate(numel: int, dtype: torch.dtype, device: torch.device, *, pinned: bool) -> Tensor:
    """Memory for a flat tensor that is walked through, beside others, from end to end.

    On a CPU it lies in large pages where the system has them (Linux, unless they are switched
    off), since finding small ones takes a good part of the time; what is written while a forked
    process lives, as of a DataLoader, goes to small ones. It starts in the middle of a
    page, since other large tensors start near the beginning of one: caches that choose a set by
    the place within a page would have to hold both in the same few.

    Args:
        pinned: whether copies from and to a device go on beside the host.
    """
    num_bytes = numel * dtype.itemsize
    if pinned or device.type != "cpu" or num_bytes < _LARGE_PAGE or _LARGE is None:
        return torch.empty(numel, dtype=dtype, device=device, pin_memory=pinned)
    half = mmap.PAGESIZE // 2
    # Whole pages, for which alone newer systems choose an address where large ones fit.
    length = -(-(half + num_bytes) // _LARGE_PAGE) * _LARGE_PAGE
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel that was built without
        memory.madvise(_LARGE)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=half)


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
