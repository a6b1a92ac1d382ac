"""How far apart two stored tensors are, streamed past each other through small buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint.reading.opened import Catalog, StoredTensor
from sharded_ema.checkpoint.reading.stream import SourceFiles, stream_tensor
from sharded_ema.checkpoint.safetensors import ITEMSIZE
from sharded_ema.tools.casting import FLOATING, Bytes, widen

# Elements compared at a time: a few megabytes in float64, which stay in the cache.
_ELEMENTS = 1 << 17
_INTEGERS = {
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "BOOL": "<u1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1",
}  # fmt: skip


@dataclass(slots=True)
class Distance:
    """Sums over elements in float64.

    Attributes:
        apart: of squared differences.
        norm: of squares of the second tensor, its NaN and Inf left out.
        largest: absolute difference.
        elements: how many were compared.
        differing: how many of them are not equal. Elements of one dtype are equal if their bits
            are, elements of two dtypes if they have the same value or are both NaN.
    """

    apart: float = 0.0
    norm: float = 0.0
    largest: float = 0.0
    elements: int = 0
    differing: int = 0

    def add(self, other: Distance, *, counts_only: bool = False) -> None:
        """Take in the sums of another tensor, or only how many of its elements differ."""
        self.elements += other.elements
        self.differing += other.differing
        if not counts_only:
            self.apart += other.apart
            self.norm += other.norm
            # NaN stays, whichever comes first.
            self.largest = float(np.maximum(self.largest, other.largest))

    @property
    def equal(self) -> bool:
        """Whether no element differs."""
        return not self.differing

    @property
    def relative(self) -> float | None:
        """Norm of the difference over norm of the second tensor; ``None`` if not finite."""
        if not self.apart:
            return 0.0
        value = math.sqrt(self.apart / self.norm) if self.norm else math.inf
        return value if math.isfinite(value) else None


def comparable(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether :func:`distance` can compare two tensors: 8-bit floats only with their own kind."""
    known = {left.dtype, right.dtype} <= FLOATING | _INTEGERS.keys()
    return left.shape == right.shape and (known or left.dtype == right.dtype)


def distance(
    left_catalog: Catalog, left: StoredTensor, right_catalog: Catalog, right: StoredTensor
) -> Distance:
    """Compare two tensors for which :func:`comparable` holds.

    Raises:
        CheckpointCorruptError: data is damaged.
    """
    found = Distance()
    with SourceFiles(left_catalog.path) as here, SourceFiles(right_catalog.path) as there:
        blocks = _in_step(_blocks(here, left_catalog, left), _blocks(there, right_catalog, right),
                          ITEMSIZE[left.dtype], ITEMSIZE[right.dtype])  # fmt: skip
        for mine, theirs in blocks:
            _compare(found, mine, left.dtype, theirs, right.dtype)
    return found


def _compare(found: Distance, mine: Bytes, dtype: str, theirs: Bytes, other: str) -> None:
    raw = _values(theirs, other)
    found.elements += raw.size
    found.norm += _square(raw)
    if dtype == other and np.array_equal(mine, theirs):
        return
    values = _values(mine, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = values - raw
    if dtype == other:
        bits = np.dtype(f"<u{ITEMSIZE[dtype]}")
        differing = mine.view(bits) != theirs.view(bits)
    else:
        differing = (values != raw) & ~(np.isnan(values) & np.isnan(raw))
    # Equal infinities are no NaN apart.
    apart[~differing] = 0.0
    found.differing += int(np.count_nonzero(differing))
    with np.errstate(over="ignore"):
        found.apart += float(np.dot(apart, apart))
    found.largest = float(np.maximum(found.largest, np.abs(apart).max(initial=0.0)))


def _square(values: NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        norm = float(np.dot(values, values))
    if math.isfinite(norm):
        return norm
    finite = values[np.isfinite(values)]
    return float(np.dot(finite, finite))


def _values(data: Bytes, dtype: str) -> NDArray[np.float64]:
    if dtype in FLOATING:
        return widen(data, dtype)
    if dtype in _INTEGERS:
        return data.view(_INTEGERS[dtype]).astype("<f8")
    return np.full(data.size // ITEMSIZE[dtype], np.nan)  # how far apart cannot be said


def _blocks(files: SourceFiles, catalog: Catalog, tensor: StoredTensor) -> Iterator[Bytes]:
    chunks = catalog.chunks(tensor.key)
    return stream_tensor(files, tensor.key, tensor.shape, ITEMSIZE[tensor.dtype], chunks)


def _in_step(
    left: Iterator[Bytes], right: Iterator[Bytes], left_size: int, right_size: int
) -> Iterator[tuple[Bytes, Bytes]]:
    """Blocks of equally many elements, from two streams whose blocks end elsewhere."""
    a = b = np.empty(0, np.uint8)
    while True:
        a = a if a.size else next(left, a)
        b = b if b.size else next(right, b)
        count = min(a.size // left_size, b.size // right_size, _ELEMENTS)
        if not count:
            return
        yield a[: count * left_size], b[: count * right_size]
        a, b = a[count * left_size :], b[count * right_size :]
