"""Whether blocks fill their tensors, of all tensors of a checkpoint at once.

A model of a trillion parameters on a thousand ranks lies in millions of blocks: what is asked of
them here is asked of columns of numbers, some rows at a time.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint.safetensors import ITEMSIZE
from sharded_ema.model.layout import Shape

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
_Words = NDArray[np.uint64]

# Of splitmix64, whose steps make every bit of the result depend on every bit of a number.
_MIX = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)


class Coverage:
    """What the blocks of many tensors, which come in batches of rows, say of their tensors.

    Blocks fill a tensor with neither hole nor overlap exactly when the corners of all, with
    alternating signs, cancel those of the whole (see :func:`.chunks.tiles`, which compares them
    one by one). Here each coordinate of a dimension stands for a random number of 64 bits, drawn
    anew in each process, and a block for the product over the dimensions of the differences
    between its ends. The sum over the blocks is that of the whole if they fill it, and else only
    by a chance of less than one in 2 ** 50.

    Args:
        shapes: of the tensors; the position is the tensor's number.
        dtypes: their safetensors names.
        width: dimensions that a row has; beyond those of the tensor offsets are 0 and sizes 1.

    Attributes:
        cut: ``[tensors, width]``; whether a block is shorter than the tensor there.
        flat: ``[tensors]``; whether the elements of each block are one run in C order.
    """

    def __init__(self, shapes: Sequence[Shape], dtypes: Sequence[str], width: int) -> None:
        count = len(shapes)
        self._shapes = np.ones((count, width), np.int64)
        self._itemsize = np.fromiter((ITEMSIZE[name] for name in dtypes), np.int64, count)
        self._refused = np.zeros(count, np.bool_)
        for number, (shape, itemsize) in enumerate(zip(shapes, self._itemsize, strict=True)):
            if len(shape) > width or math.prod(shape) * int(itemsize) >= 1 << 63:
                self._refused[number] = True
            else:
                self._shapes[number, : len(shape)] = shape
        extents = np.maximum(self._shapes, 1)
        self._strides = np.ones_like(extents)
        self._strides[:, :-1] = np.cumprod(extents[:, :0:-1], axis=1)[:, ::-1]
        self.cut = np.zeros((count, width), np.bool_)
        self.flat = np.ones(count, np.bool_)
        self._seeds = [np.uint64(secrets.randbits(64)) for _ in range(width)]
        self._ends = np.stack(
            [self._end(dim, self._shapes[:, dim]) for dim in range(width)], axis=1
        )
        # What the blocks so far lack of the whole.
        self._rest = np.where(
            (self._shapes > 0).all(axis=1), np.multiply.reduce(self._ends, axis=1), np.uint64(0)
        )

    def _hashed(self, dim: int, coordinate: Integers) -> _Words:
        found = coordinate.astype(np.uint64)
        found += self._seeds[dim]
        found ^= found >> np.uint64(30)
        found *= _MIX[0]
        found ^= found >> np.uint64(27)
        found *= _MIX[1]
        found ^= found >> np.uint64(31)
        return found

    def _end(self, dim: int, stop: Integers) -> _Words:
        return self._hashed(dim, stop) - self._hashed(dim, np.zeros_like(stop))

    def add(self, tensor: Integers, offsets: Integers, sizes: Integers) -> Integers:
        """Take more blocks into account.

        Args:
            tensor: ``[n]``, numbers of the tensors, ascending.
            offsets, sizes: ``[n, width]``, in elements.

        Returns:
            Bytes of each block, ``[n]``; of one that juts out of its tensor any number.
        """
        if not tensor.size:
            return tensor
        shape = self._shapes[tensor]
        shorter = sizes != shape
        inside = (offsets >= 0) & (sizes > 0) & (offsets <= shape - sizes)
        volume = np.multiply.reduce(sizes, axis=1)
        ends = np.ones(len(tensor), np.uint64)
        span = np.zeros(len(tensor), np.int64)
        for dim in range(sizes.shape[1]):
            span += (sizes[:, dim] - 1) * self._strides[tensor, dim]
            if not shorter[:, dim].any():
                ends *= self._ends[tensor, dim]
                continue
            start = offsets[:, dim]
            ends *= self._hashed(dim, start + sizes[:, dim]) - self._hashed(dim, start)
        firsts = np.flatnonzero(np.diff(tensor, prepend=-1))
        met = tensor[firsts]
        self.cut[met] |= np.logical_or.reduceat(shorter, firsts, axis=0)
        self.flat[met] &= np.logical_and.reduceat(span + 1 == volume, firsts)
        self._rest[met] -= np.add.reduceat(ends, firsts)
        self._refused[met] |= ~np.logical_and.reduceat(inside.all(axis=1), firsts)
        return np.asarray(volume * self._itemsize[tensor])

    def refuse(self, tensors: Integers | Flags) -> None:
        """Note that blocks of some tensors are wrong for another reason."""
        self._refused[tensors] = True

    def faulty(self) -> Integers:
        """The numbers of the tensors that are not filled, or refused, ascending."""
        return np.flatnonzero(self._refused | (self._rest != 0))
