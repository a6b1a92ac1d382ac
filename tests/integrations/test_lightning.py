"""The callback against Lightning's own, in one process; and what it does beside that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lightning = pytest.importorskip("lightning", reason="of make test-stacks: pip install lightning")
from lightning.pytorch.callbacks import EMAWeightAveraging as Theirs  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from sharded_ema.errors import ConfigError, EMAWarning, SwapError  # noqa: E402
from sharded_ema.integrations.lightning import EMAWeightAveraging  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
]


class Lit(lightning.LightningModule):
    """Learns the sum of 4 numbers; with statistics, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.seen: list[Tensor] = []
        self.train_loss: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self._loss(batch)
        self.train_loss.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.seen.append(self.net[0].weight.detach().clone())
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Tensor, index: int) -> None:
        self.log("test_loss", self._loss(batch))

    def _loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches(n: int) -> torch.utils.data.DataLoader:
    data = torch.randn(n * 8, 4, generator=torch.Generator().manual_seed(n))
    return torch.utils.data.DataLoader(data, batch_size=8)


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> lightning.Trainer:
    settings = {
        "max_epochs": 5,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 10,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **settings,
    }
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fit(folder: Path, *callbacks: Any, resume: Path | None = None, **settings: Any) -> Lit:
    lit = Lit()
    t = trainer(folder, *callbacks, **settings)
    t.fit(lit, batches(40), batches(2), ckpt_path=resume)
    lit.losses = t.callback_metrics
    return lit


# Float buffers are averaged as parameters are. Integers are not: Lightning's rounds them down.
COUNTERS = "net.1.num_batches_tracked"


class History(lightning.Callback):
    """Every step's parameters and buffers."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Lit, *_: Any) -> None:
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def plain_loop(
    states: list[dict[str, Tensor]], *, decay: float = 0.999, use_buffers: bool = True,
    update_every_n_steps: int = 1, update_starting_at_step: int = 0,
    update_starting_at_epoch: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What Lightning documents of its callback, with one rounding less than its own arithmetic."""
    average: dict[str, Tensor] = {}

    def update(state: dict[str, Tensor]) -> None:
        if not average:
            average.update((name, value.clone()) for name, value in state.items())
        for name, value in state.items():
            if value.is_floating_point() and (use_buffers or "running" not in name):
                average[name].lerp_(value, 1 - decay)
            else:
                average[name] = value

    for i, state in enumerate(states):
        n = update_every_n_steps
        if n and i >= update_starting_at_step and i % n == 0:
            update(state)
        epoch, ended = divmod(i + 1, 40)
        if update_starting_at_epoch is not None and not ended and epoch > update_starting_at_epoch:
            update(state)
    return average


@pytest.mark.parametrize(
    "settings",
    [
        {"decay": 0.99},
        {"decay": 0.9, "update_every_n_steps": 3},
        {"decay": 0.9, "update_every_n_steps": 4, "update_starting_at_step": 50},
        {"decay": 0.5, "update_every_n_steps": 0, "update_starting_at_epoch": 1},
        {"decay": 0.9, "update_every_n_steps": 7, "update_starting_at_epoch": 2},
        {"decay": 0.95, "use_buffers": False, "update_starting_at_step": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.filterwarnings("ignore:.*running statistics:sharded_ema.errors.EMAWarning")
def test_200_steps_as_lightnings_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    history = History()
    theirs = fit(tmp_path, Theirs(**settings))
    ours = fit(tmp_path, EMAWeightAveraging(**settings), history)
    assert ours.train_loss == theirs.train_loss
    expected = plain_loop(history.states, **settings)
    for name, value in ours.state_dict().items():
        if settings.get("use_buffers", True) or "running" not in name:
            assert torch.equal(value, expected[name]), name
        if name != COUNTERS:
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=2e-6, atol=2e-6)
    begun = 1 + 2 * (settings.get("update_starting_at_step", 0) // 40)  # sanity checking saw one
    if not settings.get("update_every_n_steps", 1):
        begun += 2 * settings["update_starting_at_epoch"] + 2  # Lightning validates before it
    for mine, other in zip(ours.seen[begun:], theirs.seen[begun:], strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)
