"""The clock that says when the average moves, and the memory it moves in."""

from __future__ import annotations

import math

import pytest
import torch

from sharded_ema.averaging.schedules import Constant, Power, Warmup
from sharded_ema.averaging.shadow import Action, Clock, Shadow
from sharded_ema.errors import ConfigError, StateError


def test_late_start_and_windows() -> None:
    clock = Clock(update_every=10, start_step=37)
    actions = {}
    for _ in range(80):
        action = clock.tick()
        if action is not Action.NONE:
            actions[clock.applied_steps] = action
        if action is Action.LERP:
            clock.last_lerp_step = clock.applied_steps
    assert actions == {
        37: Action.SEED,
        47: Action.LERP,
        57: Action.LERP,
        67: Action.LERP,
        77: Action.LERP,
    }
    assert clock.num_updates == 80 - 37


def test_window_is_the_product_of_its_decays() -> None:
    clock = Clock(update_every=4)
    clock.reseed()
    schedule = Warmup(0.999)
    while clock.tick() is not Action.LERP:
        pass
    assert clock.window_decay(schedule) == math.prod(schedule.decay(n) for n in (1, 2, 3, 4))
    clock.last_lerp_step = clock.applied_steps
    while clock.tick() is not Action.LERP:
        pass
    assert clock.window_decay(schedule) == math.prod(schedule.decay(n) for n in (5, 6, 7, 8))
    assert clock.window_decay(Constant(0.9)) == pytest.approx(0.9**4)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_a_decay_out_of_range_is_refused(value: float) -> None:
    class Broken:
        def decay(self, n: int) -> float:
            return value if n == 2 else 0.5

        def to_dict(self) -> dict[str, object]:
            return {"type": "Broken"}

    clock = Clock(update_every=2)
    clock.reseed()
    clock.tick()
    clock.tick()
    with pytest.raises(ConfigError, match=r"gives the decay .* at n = 2"):
        clock.window_decay(Broken())  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [1, 2, 5, 20])
def test_linear_ramp_has_the_same_average_for_every_update_interval(every: int) -> None:
    """The average of a ramp lags by its horizon, however seldom it is updated."""
    live = [torch.zeros(1)]
    shadow = Shadow(
        {"p": Power(gamma=6.94)},
        live,
        dtype=torch.float32,
        device=None,
        guard=False,
        impl="foreach",
    )
    clock = Clock(update_every=every)
    clock.reseed()
    shadow.seed(keep_nonfinite=True)
    for step in range(1, 2001):
        live[0].fill_(step)
        if clock.tick() is Action.LERP:
            shadow.lerp(clock)
    mean = float(shadow.views["p"][0]) / 2000
    assert mean == pytest.approx((6.94 + 1) / (6.94 + 2), abs=0.01)


def test_views_share_one_buffer_and_keep_memory_order() -> None:
    live = [
        torch.randn(3, 5),
        torch.randn(8, 4, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 4).t(),
        torch.randn(()),
        torch.empty(0, 3),
    ]
    shadow = Shadow(
        {"a": Constant(0.9), "b": Constant(0.99)},
        live,
        dtype=torch.float32,
        device=None,
        guard=True,
        impl="foreach",
    )
    shadow.seed(keep_nonfinite=True)
    for views in shadow.views.values():
        assert len({v.untyped_storage().data_ptr() for v in views if v.numel()}) == 1
        for view, parameter in zip(views, live, strict=True):
            assert torch.equal(view, parameter)
            assert view.stride() == parameter.stride() or not view.numel()
    assert sum(shadow.num_bytes.values()) == 2 * 4 * sum(t.numel() for t in live)


def test_follows_parameters_that_moved() -> None:
    live = [torch.randn(10), torch.randn(4)]
    shadow = Shadow(
        {"ema": Constant(0.5)}, live, dtype=torch.float32, device=None, guard=True, impl="foreach"
    )
    clock = Clock()
    clock.reseed()
    shadow.seed(keep_nonfinite=True)
    moved = [t.to(torch.bfloat16) + 1 for t in live]
    shadow.follow(moved, ["a", "b"])
    clock.tick()
    shadow.lerp(clock)
    for view, old, new in zip(shadow.views["ema"], live, moved, strict=True):
        assert torch.equal(view, torch.lerp(old, new.float(), 0.5))
    with pytest.raises(StateError, match="parameter b had local shape"):
        shadow.follow([moved[0], torch.randn(5)], ["a", "b"])


def test_a_late_seed_keeps_nonfinite_elements_out() -> None:
    live = [torch.ones(4)]
    shadow = Shadow(
        {"ema": Constant(0.5)}, live, dtype=torch.float32, device=None, guard=True, impl="foreach"
    )
    assert shadow.seed(keep_nonfinite=False) == []
    live[0].copy_(torch.tensor([2.0, math.nan, math.inf, 5.0]))
    assert shadow.seed(keep_nonfinite=False) == [0]
    assert shadow.views["ema"][0].tolist() == [2.0, 1.0, 1.0, 5.0]


def test_a_bf16_shadow_would_stand_still() -> None:
    """Why fp32 is the default: the same run in both dtypes."""
    live = [torch.ones(8)]
    clock = Clock()
    shadows = [
        Shadow({"ema": Constant(0.999)}, live, dtype=d, device=None, guard=False, impl="foreach")
        for d in (torch.float32, torch.bfloat16)
    ]
    for shadow in shadows:
        shadow.seed(keep_nonfinite=True)
    live[0].fill_(1.2)
    for _ in range(500):
        for shadow in shadows:
            clock.reseed()
            clock.tick()
            shadow.lerp(clock)
    assert float(shadows[0].views["ema"][0][0]) > 1.07
    assert float(shadows[1].views["ema"][0][0]) == 1.0
