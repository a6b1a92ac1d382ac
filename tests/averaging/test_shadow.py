"""The memory that an average moves in."""

from __future__ import annotations

import math

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
