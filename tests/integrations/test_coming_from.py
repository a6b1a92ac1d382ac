"""The settings of docs/coming-from.md give the numbers that it says, over 200 steps.

What is installed is compared with itself; of the others the formula in their source is, which the
page names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
)

from sharded_ema import Power, Schedule, ShardedEMA, Warmup
from tests.integrations.facades import file_of_timm

STEPS = 200
#: Of weights of about 1, what roundings of the last place add up to in an average of 30 steps.
LAST_PLACE = 2e-6
pytestmark = pytest.mark.filterwarnings("ignore:the model has .* buffers with running statistics")


def make_net(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Linear(16, 8)]
    return nn.Sequential(*layers)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[int], None]) -> None:
    for step in range(1, STEPS + 1):
        x = torch.randn(16, 8)
        (net(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def far_off(
    schedule: float | str | Schedule,
    theirs: Callable[[nn.Module], tuple[Callable[[int], None], Callable[[], dict[str, Tensor]]]],
    *,
    norm: bool = False,
    **options: Any,
) -> float:
    """How far our average is from theirs at the end, at most.

    Args:
        theirs: makes their average of a model; what to call after a step, and what gives it.
        norm: with a layer that has buffers.
    """
    net = make_net(norm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    after, values = theirs(net)
    ema = ShardedEMA(net, schedule, **options)
    ema.attach(optimizer)
    train(net, optimizer, after)
    ours, found = ema.full_state_dict(), values()
    assert found.keys() <= ours.keys() and len(found) >= 4
    return max(
        float((ours[name] - value).abs().max())
        for name, value in found.items()
        if value.is_floating_point()
    )


def named(net: nn.Module, values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach()
        for (name, _), value in zip(net.named_parameters(), values, strict=True)
    }


def formula(rule: Callable[[Tensor, Tensor, int], Tensor], first: int = 0) -> Any:
    """A plain loop of ``average <- rule(average, parameter, step)``.

    Args:
        first: step up to which the average is the parameters.
    """

    def make(net: nn.Module) -> Any:
        average = [p.detach().clone() for p in net.parameters()]

        @torch.no_grad()
        def after(step: int) -> None:
            for a, p in zip(average, net.parameters(), strict=True):
                a.copy_(p if step <= first else rule(a, p, step))

        return after, lambda: named(net, average)

    return make


# ---------------------------------------------------------------------- torch.optim.swa_utils


def averaged_model(**options: Any) -> Any:
    def make(net: nn.Module) -> Any:
        average = AveragedModel(net, **options)
        return lambda step: average.update_parameters(net), average.module.state_dict

    return make


def test_averaged_model() -> None:
    multi = averaged_model(multi_avg_fn=get_ema_multi_avg_fn(0.97))
    assert far_off(0.97, multi, start_step=1) == 0
    assert far_off(0.97, multi) > 1e-5, "its first update copies, and ours is of the weights before"
    buffers = averaged_model(multi_avg_fn=get_ema_multi_avg_fn(0.97), use_buffers=True)
    assert far_off(0.97, buffers, start_step=1, buffers="average", norm=True) == 0
    single = averaged_model(avg_fn=get_ema_avg_fn(0.97))
    assert 0 < far_off(0.97, single, start_step=1) <= LAST_PLACE


def test_equal_weights() -> None:
    """The mean of all weights: the weight 1/n of the n-th is a float32 there."""
    for options in ({}, {"multi_avg_fn": get_swa_multi_avg_fn()}):
        assert far_off(Power(gamma=0.0), averaged_model(**options)) <= LAST_PLACE


# ---------------------------------------------------------------------- timm, diffusers, torch_ema


@pytest.mark.parametrize(
    ("settings", "schedule", "options"),
    [
        ({"decay": 0.97}, 0.97, {"start_step": 1}),
        ({"decay": 0.97, "update_after_step": 30}, 0.97, {"start_step": 31}),
        (
            {"use_warmup": True, "warmup_power": 0.75, "update_after_step": 30, "min_decay": 0.2},
            Warmup(0.9999, "inverse_gamma", power=0.75, min_decay=0.2),
            {"start_step": 30},
        ),
    ],
)
def test_timm(settings: dict[str, Any], schedule: Any, options: dict[str, int]) -> None:
    their_class = file_of_timm()

    def make(net: nn.Module) -> Any:
        average = their_class(net, **settings)
        return lambda step: average.update(net, step=step), average.module.state_dict

    assert far_off(schedule, make, buffers="average", norm=True, **options) == 0


@pytest.mark.parametrize(
    ("settings", "schedule", "options"),
    [
        ({}, Warmup(0.9999), {"start_step": 1}),
        (
            {"decay": 0.95, "min_decay": 0.3, "update_after_step": 30},
            Warmup(0.95, min_decay=0.3),
            {"start_step": 31},
        ),
        (
            {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "update_after_step": 30},
            Warmup(0.9999, "inverse_gamma", inv_gamma=2.0, power=0.75),
            {"start_step": 30},
        ),
    ],
)
def test_diffusers(settings: dict[str, Any], schedule: Any, options: dict[str, int]) -> None:
    theirs = pytest.importorskip("diffusers.training_utils", reason="pip install diffusers")

    def make(net: nn.Module) -> Any:
        average = theirs.EMAModel(net.parameters(), **settings)
        return (
            lambda step: average.step(net.parameters()),
            lambda: named(net, average.shadow_params),
        )

    assert 0 < far_off(schedule, make, **options) <= LAST_PLACE


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [({"decay": 0.9999}, "warmup:0.9999"), ({"decay": 0.97, "use_num_updates": False}, 0.97)],
)
def test_torch_ema(settings: dict[str, Any], schedule: Any) -> None:
    theirs = pytest.importorskip("torch_ema", reason="pip install torch_ema")

    def make(net: nn.Module) -> Any:
        average = theirs.ExponentialMovingAverage(net.parameters(), **settings)
        return lambda step: average.update(), lambda: named(net, average.shadow_params)

    assert 0 < far_off(schedule, make) <= LAST_PLACE


# ---------------------------------------------------------------------- ema-pytorch


class Every:
    """The decay of every ``steps``-th step alone, as ema-pytorch has it; 1 moves nothing."""

    def __init__(self, steps: int, schedule: Schedule) -> None:
        self.steps, self.schedule = steps, schedule

    def decay(self, n: int) -> float:
        """That of the schedule at steps 1, 1 + ``steps``, and so on."""
        return self.schedule.decay(n) if (n - 1) % self.steps == 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Type and settings."""
        return {"type": "Every", "steps": self.steps, "schedule": self.schedule.to_dict()}


@pytest.mark.parametrize(("update_every", "after"), [(1, 100), (10, 100)])
def test_ema_pytorch(update_every: int, after: int) -> None:
    """Its decay is computed in float32: up to 1e-7 off, which weighs more the longer the average.

    After 100 steps of a shared start the difference is below 1e-6.
    """
    theirs = pytest.importorskip("ema_pytorch", reason="pip install ema-pytorch")

    def make(net: nn.Module) -> Any:
        average = theirs.EMA(
            net, update_every=update_every, update_after_step=after, include_online_model=False
        )
        return lambda step: average.update(), average.ema_model.state_dict

    schedule: Schedule = Warmup(0.9999, "inverse_gamma")
    if update_every > 1:
        schedule = Every(update_every, schedule)
    assert far_off(schedule, make, start_step=after) <= 1e-6


# ---------------------------------------------------------------------- Lightning


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning", reason="pip install lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    net, seen = make_net(), {}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Tensor) -> Tensor:
            return (self.net(batch) - batch.flip(1)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    class Ours(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen["ema"] = ShardedEMA(net, 0.97, start_step=1)
            seen["ema"].attach(*trainer.optimizers)

    average = callbacks.EMAWeightAveraging(decay=0.97, use_buffers=False)
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, callbacks=[average, Ours()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.randn(16 * STEPS, 8), batch_size=16)
    trainer.fit(Module(), loader)
    ours = seen["ema"].full_state_dict()
    # After the training Lightning's average is in the model.
    far = max(float((ours[n] - p.detach()).abs().max()) for n, p in net.named_parameters())
    assert 0 < far <= LAST_PLACE


# ---------------------------------------------------------------------- formulas


def test_composer() -> None:
    """compute_ema; EMA begins with a copy of the model after the first batch."""
    d = 2 ** (-1 / 20)
    theirs = formula(lambda a, p, step: a * d + (1.0 - d) * p, first=1)
    assert 0 < far_off("half_life:20", theirs, start_step=1) <= LAST_PLACE


def test_torchtitan() -> None:
    """torch._foreach_lerp_ with 1 - decay, from the weights before the first step."""
    theirs = formula(lambda a, p, step: torch.lerp(a, p, 1.0 - 2.0 ** (-1.0 / (0.05 * step))))
    assert far_off("half_life_fraction:0.05", theirs) == 0
    assert far_off(0.97, formula(lambda a, p, step: torch.lerp(a, p, 1.0 - 0.97))) == 0


def test_nemo() -> None:
    """ema_update: torch._foreach_mul_ and torch._foreach_add_."""
    theirs = formula(lambda a, p, step: (a * 0.97).add_(p, alpha=1.0 - 0.97))
    assert 0 < far_off(0.97, theirs) <= LAST_PLACE


def test_deepspeed_chat() -> None:
    """moving_average: torch.lerp from the weights to the average, with beta."""
    theirs = formula(lambda a, p, step: torch.lerp(p, a, 0.992))
    assert 0 < far_off(0.992, theirs) <= LAST_PLACE
