"""Geometry: which elements of a global tensor a rank owns (standard library only).

What a rank owns of a tensor is *a flat range inside a box*. A DTensor shard is a whole box; a
slice of a replicated tensor is a range inside the whole tensor. A range splits into at most
``2 * ndim - 1`` boxes that are each contiguous in it, which is the only form that the
checkpoint side knows: any layout therefore loads into any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned block of a global tensor.

    Attributes:
        offsets: index of the first element, one entry per dimension.
        sizes: extent in elements, one entry per dimension; ``()`` for a 0-d tensor.
    """

    offsets: Shape
    sizes: Shape

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"offsets {self.offsets} and sizes {self.sizes} differ in rank")
        if min((*self.offsets, *self.sizes), default=0) < 0:
            raise ValueError(f"negative extent in {self}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that is all of a tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What a tensor is indexed with to have the box of it."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the box lies inside a tensor of ``shape``."""
        return len(shape) == len(self.sizes) and all(
            offset + size <= extent
            for offset, size, extent in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def shifted(self, offsets: Sequence[int]) -> Box:
        """The same block, counted from where ``offsets`` is the origin's place."""
        return Box(tuple(o + by for o, by in zip(self.offsets, offsets, strict=True)), self.sizes)

    def within(self, other: Box) -> Box:
        """The same block, which lies in ``other``, counted from the start of that."""
        offsets = (o - by for o, by in zip(self.offsets, other.offsets, strict=True))
        return Box(tuple(offsets), self.sizes)

    def permuted(self, dims: Sequence[int]) -> Box:
        """The box with its dimensions in another order, as by ``torch.permute``."""
        return Box(tuple(self.offsets[d] for d in dims), tuple(self.sizes[d] for d in dims))

    def inside(self, other: Box) -> Box | None:
        """The same block, counted from the start of ``other``; ``None`` if it juts out."""
        offsets = [o - by for o, by in zip(self.offsets, other.offsets, strict=True)]
        if min(offsets, default=0) < 0:
            return None
        part = Box(tuple(offsets), self.sizes)
        return part if part.fits(other.sizes) else None

    def common(self, other: Box) -> Box | None:
        """The elements that both have; ``None`` if there are none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(
            min(a + n, b + m) - offset
            for a, n, b, m, offset in zip(
                self.offsets, self.sizes, other.offsets, other.sizes, offsets, strict=True
            )
        )
        return Box(offsets, sizes) if min(sizes, default=1) > 0 else None

    def overlaps(self, other: Box) -> bool:
        """Whether the two boxes share at least one element."""
        if not self.numel or not other.numel:
            return False
        return all(
            a < b + m and b < a + n
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )

    def flat_run(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """``(start, stop)`` of the box in C order of a tensor of ``shape`` if it is one run.

        Returns ``None`` when the elements of the box are not consecutive in the tensor.
        """
        if not self.numel:
            return (0, 0)
        strides = c_strides(shape)
        start = sum(o * s for o, s in zip(self.offsets, strides, strict=True))
        last = sum(
            (o + n - 1) * s for o, n, s in zip(self.offsets, self.sizes, strides, strict=True)
        )
        return (start, last + 1) if last + 1 - start == self.numel else None


@dataclass(frozen=True, slots=True)
class FlatRange:
    """Elements ``start`` to ``stop`` (exclusive) of a box, counted in C order."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a range: {self.start} to {self.stop}")

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def boxes(self, shape: Sequence[int]) -> Iterator[tuple[int, Box]]:
        """Split into at most ``2 * ndim - 1`` boxes of a tensor of ``shape``.

        Yields:
            ``(position, box)``: the box, contiguous in the range from element ``position`` on
            (counted from ``start``), in ascending order.
        """
        if self.stop > math.prod(shape):
            raise ValueError(f"range {self.start}:{self.stop} exceeds a tensor of {tuple(shape)}")
        if not shape:
            if self.numel:
                yield 0, Box((), ())
            return
        strides = c_strides(shape)
        position = self.start
        while position < self.stop:
            dim = _deepest_dim(position, self.stop, strides)
            stride = strides[dim]
            index = [position // s % n for s, n in zip(strides, shape, strict=True)]
            count = min((self.stop - position) // stride, shape[dim] - index[dim])
            sizes = (1,) * dim + (count, *shape[dim + 1 :])
            yield position - self.start, Box(tuple(index), sizes)
            position += count * stride


def _deepest_dim(position: int, stop: int, strides: Sequence[int]) -> int:
    """The outermost dimension along which a whole row starts at ``position`` and ends in time."""
    for dim, stride in enumerate(strides):
        if position % stride == 0 and position + stride <= stop:
            return dim
    raise AssertionError("the innermost stride is 1, so some dimension always fits")


def c_strides(shape: Sequence[int]) -> Shape:
    """Strides in elements of a contiguous tensor of ``shape`` (row-major)."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def divide(
    sizes: Sequence[int], num_parts: int, *, indivisible: Sequence[bool] | None = None
) -> list[dict[int, FlatRange]]:
    """Divide tensors of ``sizes`` elements evenly over ``num_parts`` replicas.

    Tensors marked ``indivisible`` (their C order is not their storage order) go whole to the
    least loaded part, largest first; the others are cut where the shares end, so that the
    shares differ by at most one element as long as no indivisible tensor exceeds a share.

    Returns:
        For every part its range of each tensor that it keeps something of, in C order, by the
        position of the tensor in ``sizes``, ascending.
    """
    whole = indivisible or [False] * len(sizes)
    loads = [0] * num_parts
    parts: list[dict[int, FlatRange]] = [{} for _ in range(num_parts)]
    for index in sorted((i for i, w in enumerate(whole) if w), key=lambda i: (-sizes[i], i)):
        part = loads.index(min(loads))
        loads[part] += sizes[index]
        if sizes[index]:
            parts[part][index] = FlatRange(0, sizes[index])
    room = _room(loads, sum(n for n, w in zip(sizes, whole, strict=True) if not w))
    part = 0
    for index, size in enumerate(sizes):
        start = 0
        while not whole[index] and start < size:
            while not room[part]:
                part += 1
            stop = min(size, start + room[part])
            parts[part][index] = FlatRange(start, stop)
            room[part] -= stop - start
            start = stop
    return [dict(sorted(ranges.items())) for ranges in parts]


def _room(loads: Sequence[int], total: int) -> list[int]:
    """How many of ``total`` further elements each part takes so that the sums come out level."""
    order = sorted(range(len(loads)), key=lambda i: (loads[i], i))
    for used in range(len(order), 0, -1):
        filled = order[:used]
        level, extra = divmod(total + sum(loads[i] for i in filled), used)
        if level >= max(loads[i] for i in filled):
            break
    room = [0] * len(loads)
    for nth, i in enumerate(sorted(filled)):
        room[i] = level + (nth < extra) - loads[i]
    return room
