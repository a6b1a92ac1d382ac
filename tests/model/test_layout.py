"""Geometry over random shapes, 0-d and empty ones included."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_ema.model.layout import Box, FlatRange, c_strides, divide

shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    total = math.prod(shape)
    start = draw(st.integers(0, total))
    return shape, start, draw(st.integers(start, total))


@given(ranges())
def test_a_range_is_covered_once_by_few_boxes(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    total = math.prod(shape)
    index = numpy.arange(total).reshape(shape)
    seen: list[int] = []
    boxes = list(FlatRange(start, stop).boxes(shape))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    for position, box in boxes:
        assert box.numel
        assert box.fits(shape)
        block = index[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
        elements = block.reshape(-1).tolist()
        assert box.flat_run(shape) == (elements[0], elements[-1] + 1)
        assert elements == list(range(start + position, start + position + box.numel))
        seen += elements
    assert seen == list(range(start, stop))


@given(shapes, st.data())
def test_flat_run_says_whether_a_box_is_consecutive(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    offsets, sizes = [], []
    for extent in shape:
        offset = data.draw(st.integers(0, extent))
        offsets.append(offset)
        sizes.append(data.draw(st.integers(0, extent - offset)))
    box = Box(tuple(offsets), tuple(sizes))
    index = numpy.arange(math.prod(shape)).reshape(shape)
    block = index[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1)
    run = box.flat_run(shape)
    consecutive = block.size == 0 or bool((numpy.diff(block) == 1).all())
    assert (run is not None) == consecutive
    if run is not None and block.size:
        assert run == (block[0], block[-1] + 1)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=12),
    st.integers(1, 6),
)
def test_division_covers_everything_once(tensors: list[tuple[int, bool]], parts: int) -> None:
    sizes = [n for n, _ in tensors]
    whole = [w for _, w in tensors]
    divided = divide(sizes, parts, indivisible=whole)
    covered: dict[int, list[int]] = {i: [] for i in range(len(sizes))}
    for part in divided:
        assert list(part) == sorted(part)
        for index, piece in part.items():
            covered[index] += range(piece.start, piece.stop)
            if whole[index]:
                assert piece == FlatRange(0, sizes[index])
    for index, size in enumerate(sizes):
        assert sorted(covered[index]) == list(range(size))
    loads = [sum(piece.numel for piece in part.values()) for part in divided]
    if not any(whole):
        assert max(loads) - min(loads) <= 1


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError):
        Box((0,), (1, 2))
    with pytest.raises(ValueError):
        Box((-1,), (1,))
    with pytest.raises(ValueError):
        FlatRange(3, 2)
    with pytest.raises(ValueError):
        list(FlatRange(0, 7).boxes((2, 3)))


def test_overlap_and_strides() -> None:
    assert Box((0, 0), (2, 2)).overlaps(Box((1, 1), (2, 2)))
    assert not Box((0, 0), (2, 2)).overlaps(Box((2, 0), (2, 2)))
    assert not Box((0, 0), (0, 2)).overlaps(Box((0, 0), (2, 2)))
    assert c_strides((2, 3, 4)) == (12, 4, 1)
