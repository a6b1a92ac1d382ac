"""The memory that an average moves in."""

from __future__ import annotations

import copy
import math
import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharded_ema.averaging.shadow import Shadow
from sharded_ema.errors import StateError


def make(live: list[Tensor], *profiles: str, **settings: object) -> Shadow:
    options = {"dtype": torch.float32, "device": None, "guard": True, "impl": "foreach"}
    names = [chr(ord("a") + i) for i in range(len(live))]
    return Shadow(profiles or ("ema",), live, names, **(options | settings))  # type: ignore[arg-type]


def test_views_share_one_buffer_and_keep_memory_order() -> None:
    live = [
        torch.randn(3, 5),
        torch.randn(8, 4, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 4).t(),
        torch.randn(()),
        torch.empty(0, 3),
    ]
    shadow = make(live, "a", "b")
    shadow.copy_live(keep_nonfinite=True)
    for views in shadow.views.values():
        assert len({v.untyped_storage().data_ptr() for v in views if v.numel()}) == 1
        for view, parameter in zip(views, live, strict=True):
            assert torch.equal(view, parameter)
            assert view.stride() == parameter.stride() or not view.numel()
    expected = 2 * 4 * sum(t.numel() for t in live)
    assert sum(shadow.allocated.values()) == shadow.num_bytes == expected


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")
def test_a_large_one_asks_for_large_pages_and_starts_within_one() -> None:
    live = [torch.randn(1 << 20), torch.randn(3), torch.randn(1 << 9, dtype=torch.float64)]
    shadow = make(live, dtype=None)
    shadow.copy_live(keep_nonfinite=True)
    first, second, other = shadow.views["ema"]
    assert all(map(torch.equal, (first, second, other), live))
    assert sum(shadow.allocated.values()) == shadow.num_bytes
    assert first.data_ptr() % mmap.PAGESIZE == mmap.PAGESIZE // 2
    assert second.data_ptr() == first.data_ptr() + 4 * first.numel()
    assert asked_for_large_pages(first)
    # A copy is a tensor like any other.
    copied = copy.deepcopy(shadow)
    assert all(map(torch.equal, copied.views["ema"], live))
    first.zero_()
    assert all(map(torch.equal, copied.views["ema"], live))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")
def test_the_memory_of_a_large_one_is_of_whole_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else newer systems choose an address where one of 3 MiB has no room for any.

    A smaller one is taken as any tensor is, among what others may have asked large pages for.
    """
    taken, right = [], mmap.mmap

    def noted(fileno: int, length: int, **options: int) -> mmap.mmap:
        taken.append(length)
        return right(fileno, length, **options)

    monkeypatch.setattr(mmap, "mmap", noted)
    for numel in ((2 << 18) - 1, (3 << 18) - 512, (3 << 18) + 7, (4 << 18) - 511):
        make([torch.randn(numel)])
    assert taken == [4 << 20, 4 << 20, 6 << 20]


def asked_for_large_pages(tensor: Tensor) -> bool:
    """Whether Linux was asked for large pages of its memory."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            start, end = (int(text, 16) for text in found.groups())
            within = start <= tensor.data_ptr() < end
        elif within and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("this memory is not listed")


def test_follows_parameters_that_moved() -> None:
    live = [torch.randn(10), torch.randn(4)]
    shadow = make(live)
    shadow.copy_live(keep_nonfinite=True)
    moved = [t.to(torch.bfloat16) + 1 for t in live]
    shadow.track(moved)
    shadow.lerp({"ema": 0.5})
    for view, old, new in zip(shadow.views["ema"], live, moved, strict=True):
        assert torch.equal(view, torch.lerp(old, new.float(), 0.5))
    with pytest.raises(StateError, match="parameter b had local shape"):
        shadow.track([moved[0], torch.randn(5)])


def test_a_late_seed_keeps_nonfinite_elements_out() -> None:
    live = [torch.ones(4)]
    shadow = make(live)
    assert shadow.copy_live(keep_nonfinite=False) == []
    live[0].copy_(torch.tensor([2.0, math.nan, math.inf, 5.0]))
    assert shadow.copy_live(keep_nonfinite=False) == ["a"]
    assert shadow.views["ema"][0].tolist() == [2.0, 1.0, 1.0, 5.0]


def test_a_bf16_shadow_would_stand_still() -> None:
    """Why fp32 is the default: the same run in both dtypes."""
    live = [torch.ones(8)]
    shadows = [make(live, dtype=d, guard=False) for d in (torch.float32, torch.bfloat16)]
    for shadow in shadows:
        shadow.copy_live(keep_nonfinite=True)
    live[0].fill_(1.2)
    for _ in range(500):
        for shadow in shadows:
            shadow.lerp({"ema": 0.999})
    assert float(shadows[0].views["ema"][0][0]) > 1.07
    assert float(shadows[1].views["ema"][0][0]) == 1.0


def transposed(tensor: Tensor) -> None:
    tensor.data = tensor.data.t()


def transposed_by_set(tensor: Tensor) -> None:
    rows, columns = tensor.shape
    tensor.set_(tensor.untyped_storage(), 0, (rows, columns), (1, rows))  # type: ignore[call-overload]


def every_second(tensor: Tensor) -> None:
    # The same address and shape, and back again; there is room for it, see `roomy`.
    plain = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format).stride()
    strides = [2 * s for s in plain] if tensor.is_contiguous() else plain
    tensor.data = tensor.data.as_strided(tensor.shape, strides)


def other_memory(tensor: Tensor) -> None:
    tensor.data = torch.randn_like(tensor)


def reinterpreted(tensor: Tensor) -> None:
    other = torch.bfloat16 if tensor.dtype is torch.float16 else tensor.dtype
    tensor.data = tensor.data.view(other)


def roomy(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """A square, and two vectors that follow each other in memory, with room behind them."""
    square = torch.randn(2 * rows * rows).to(dtype)[: rows * rows].view(rows, rows)
    pair = torch.randn(8 * rows).to(dtype)
    return [square, pair[:rows], pair[rows : 2 * rows]]


CHANGES = [transposed, transposed_by_set, every_second, other_memory, reinterpreted]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [6, 90, 1030])
@pytest.mark.parametrize(
    ("guard", "impl"),
    [(True, "fused"), (True, "foreach"), (False, "foreach"), (True, "reference")],
)
def test_memory_that_changes_in_place_is_followed(
    change: Callable[[Tensor], None], dtype: torch.dtype, rows: int, guard: bool, impl: str
) -> None:
    live = roomy(rows, dtype)
    shadow = make(live, "a", "b", guard=guard, impl=impl)
    shadow.copy_live(keep_nonfinite=False)
    expected = [tensor.float().clone() for tensor in live]
    for number, tensor in enumerate([live[0], live[1], live[0], live[2]]):
        if tensor.dim() == 2 or "transposed" not in change.__name__:
            change(tensor)
        assert len({id(t) for t in live}) == 3
        shadow.follow(live)
        shadow.lerp({"a": 0.5, "b": 0.9})
        for kept, now in zip(expected, live, strict=True):
            kept.lerp_(now.float(), 0.5)
        for view, kept in zip(shadow.views["a"], expected, strict=True):
            assert torch.equal(view, kept), number


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("profiles", ["a", "ab"])
def test_objects_that_are_new_each_time_are_followed(profiles: str, impl: str) -> None:
    """As buffers are: aliases, whose own shape stays when that of the buffer changes."""
    whole = torch.randn(1 << 21)
    live = [whole[: 1 << 20].view(1 << 10, 1 << 10), torch.randn(5, 5), torch.randn(())]
    shadow = make(live, *profiles, impl=impl)
    shadow.copy_live(keep_nonfinite=True)
    expected = [tensor.clone() for tensor in live]
    for step in range(6):
        if step % 2:
            for tensor in live[:2]:
                transposed(tensor)
        shadow.follow([tensor.detach() for tensor in live])
        shadow.lerp(dict.fromkeys(profiles, 0.5))
        for view, kept, now in zip(shadow.views["a"], expected, live, strict=True):
            assert torch.equal(view, kept.lerp_(now, 0.5)), step


@pytest.mark.parametrize("impl", ["fused", "foreach"])
@pytest.mark.parametrize("rows", [2, 90, 1030])
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        lambda rows: (1, rows),
        lambda rows: (rows * rows // 2, 1, 2),
        lambda rows: (1,),
        lambda rows: (rows, rows - 1),
        lambda rows: (rows, rows, 1),
    ],
)
def test_a_shape_that_changes_in_place_is_refused(
    shape: Callable[[int], tuple[int, ...]], rows: int, guard: bool, impl: str
) -> None:
    live = [torch.randn(3), torch.randn(rows, rows)]
    shadow = make(live, guard=guard, impl=impl)
    shadow.copy_live(keep_nonfinite=True)
    wanted = shape(rows)
    live[1].data = live[1].data.view(-1)[: math.prod(wanted)].view(wanted)
    with pytest.raises(StateError, match=r"parameter b had local shape"):
        shadow.follow(live)
        shadow.lerp({"ema": 0.5})
        shadow.track(live)  # what is small and unguarded is refused where somebody looks
