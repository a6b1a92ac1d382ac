"""The component in torchtitan's own checkpoint manager, optimizers, validator and configuration.

Its Trainer wants a GPU and is not run here; its parts are, as the Trainer builds them.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.launch.programs import ROOT, execute, torchrun

pytest.importorskip("torchtitan", reason="of make test-stacks: pip install torchtitan")
from torchtitan.components import validate
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.trainer import Trainer

from sharded_ema import ShardedEMA
from sharded_ema.errors import ConfigError, EMAWarning
from sharded_ema.integrations.torchtitan import (
    EMA,
    EMACheckpointManager,
    EMAValidator,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:To get the last learning rate:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.distributed"),
]


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Progress:
    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Run:
    """What torchtitan's Trainer makes, in its order, and its loop."""

    def __init__(self, folder: Path, kind: type = EMACheckpointManager, **settings: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        fully_shard(self.net, mesh=init_device_mesh("cpu", (1,)))
        groups = [  # two optimizers in the container
            ParamGroupConfig(pattern="0", optimizer_name="Adam", optimizer_kwargs={"lr": 1e-2}),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2}),
        ]
        config = OptimizersContainer.Config(param_groups=groups, implementation="foreach")
        self.optimizers = config.build(model_parts=[self.net])
        rates = LRSchedulersContainer.Config(warmup_steps=0).build(
            optimizers=self.optimizers, training_steps=6
        )
        self.progress = Progress()
        if kind is EMACheckpointManager:
            settings["ema"] = settings.get("ema", EMA.Config(schedule="0.75"))
        self.config = kind.Config(**{"enable": True, "interval": 3} | settings)
        self.checkpointer = self.config.build(
            dataloader=None, model_parts=[self.net], optimizers=self.optimizers,
            lr_schedulers=rates, states={"train_state": self.progress}, sd_adapter=None,
            base_folder=str(folder),
        )  # fmt: skip
        self.plain = [p.detach().full_tensor().clone() for p in self.net.parameters()]

    def train(self, steps: int) -> Run:
        self.checkpointer.load()
        while self.progress.step < steps:
            self.progress.step += 1
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.progress.step))
            (self.net(x) - x.sum(1, keepdim=True)).square().mean().backward()
            self.optimizers.step()
            self.optimizers.zero_grad()
            for average, now in zip(self.plain, self.weights(), strict=True):
                average.lerp_(now, 0.25)
            self.checkpointer.save(self.progress.step, last_step=self.progress.step == steps)
            self.checkpointer.maybe_wait_for_staging()
        self.checkpointer.maybe_wait_for_saving()
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach().full_tensor().clone() for p in self.net.parameters()]

    def average(self) -> list[Tensor]:
        with self.checkpointer.ema.swap():
            return self.weights()

    @property
    def updates(self) -> int:
        return self.checkpointer.ema.average.num_updates


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.shows("torchtitan", "one process")
def test_killed_between_checkpoints(tmp_path: Path, mode: str) -> None:
    settings = {"last_save_model_only": False, "async_mode": mode}
    whole = Run(tmp_path / "whole", **settings).train(6)
    assert equal(whole.average(), whole.plain)
    Run(tmp_path / "again", **settings).train(3)
    again = Run(tmp_path / "again", **settings).train(6)
    assert again.updates == 6
    assert equal(again.average(), whole.plain) and equal(again.weights(), whole.weights())
    again.checkpointer.close()


def test_last_checkpoint_has_the_model_alone_and_the_average_beside_it(tmp_path: Path) -> None:
    run = Run(tmp_path).train(6)
    folder = tmp_path / "checkpoint" / "step-6"
    inside = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert set(inside) == set(run.net.state_dict())
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    other = ShardedEMA(net, "0.75")
    assert other.load(folder / "ema") == 6 and other.num_updates == 6
    other.copy_to()
    assert equal(list(net.parameters()), run.plain)
    kept = FileSystemReader(tmp_path / "checkpoint" / "step-3").read_metadata()
    assert "ema.ema.0.weight" in kept.state_dict_metadata


def test_average_that_is_not_to_be_loaded(tmp_path: Path) -> None:
    Run(tmp_path).train(4)
    run = Run(tmp_path, exclude_from_loading=["ema"])
    assert run.checkpointer.load(3)
    assert run.updates == 0 and equal(run.average(), run.weights())
    assert not equal(run.weights(), run.plain), "the weights were loaded"


def test_run_that_kept_no_average(tmp_path: Path) -> None:
    Run(tmp_path, CheckpointManager).train(4)
    run = Run(tmp_path)
    with pytest.warns(EMAWarning, match="step-3 has no average, so it starts anew"):
        run.checkpointer.load(3)
    assert run.progress.step == 3 and run.updates == 0 and equal(run.average(), run.weights())


def test_weights_of_another_run(tmp_path: Path) -> None:
    other = Run(tmp_path / "other").train(6)
    path = str(tmp_path / "other" / "checkpoint" / "step-6")
    run = Run(tmp_path / "new", initial_load_path=path)
    run.checkpointer.load()
    assert run.updates == 0
    assert equal(run.average(), other.weights())


def test_checkpoints_may_be_off(tmp_path: Path) -> None:
    run = Run(tmp_path, enable=False).train(6)
    assert not list(tmp_path.iterdir())
    assert run.updates == 6 and equal(run.average(), run.plain)
    run.checkpointer.close()


def test_two_managers_of_the_same_optimizers_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ConfigError, match="saves already"):
        run.config.build(
            dataloader=None, model_parts=[run.net], optimizers=run.optimizers, lr_schedulers=None,
            states={}, sd_adapter=None,
        )  # fmt: skip


# ---------------------------------------------------------------------- configuration


def test_named_by_override_imports() -> None:
    config = Trainer.Config(
        checkpoint=CheckpointManager.Config(interval=7),
        validator=validate.Validator.Config(steps=3),
    )
    module = "sharded_ema.integrations.torchtitan"
    names = [
        (f"{module}.averaged", {"schedule": {"slow": "half_life:9"}, "profile": "slow"}),
        (f"{module}.validated", {"prefix": "average/"}),
    ]
    apply_overrides(OverrideConfig(imports=names), config)
    assert type(config.checkpoint) is EMACheckpointManager.Config
    assert config.checkpoint.interval == 7
    assert config.checkpoint.ema.schedule == {"slow": "half_life:9"}
    assert config.checkpoint.to_dict()["ema"]["profile"] == "slow"
    assert type(config.validator) is EMAValidator.Config
    assert (config.validator.steps, config.validator.prefix) == (3, "average/")


# ---------------------------------------------------------------------- validation


class Heard:
    """A metrics processor that keeps what is logged."""

    def __init__(self) -> None:
        self.logger, self.ntokens_since_last_log = self, 0
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_validation(self, loss: float, step: int) -> None:
        self.log({"validation_metrics/loss": loss}, step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def test_validates_weights_and_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path).train(5)
    monkeypatch.setattr(validate.utils, "device_type", "cpu")  # which torchtitan takes for none
    x = torch.randn(8, 4)
    y = torch.ones(8, dtype=torch.int64)
    loader = types.SimpleNamespace(build=lambda **_: [({"input": x}, y)])
    monkeypatch.setattr(validate, "replace", lambda *_, **__: loader)
    off = types.SimpleNamespace(
        pp_enabled=False, dp_enabled=False, cp_enabled=False, dp_cp_enabled=False
    )
    heard = Heard()
    validator = EMAValidator.Config(steps=1).build(
        parallelism=types.SimpleNamespace(spmd_backend="default"), dp_world_size=1, dp_rank=0,
        tokenizer=None, parallel_dims=off, loss_fn=lambda out, labels: (out.square().sum(), None),
        validation_context=contextlib.nullcontext, metrics_processor=heard, seq_len=1,
        local_batch_size=8,
    )  # fmt: skip
    validator.validate([run.net], 5)
    with torch.no_grad():
        raw = run.net(x).square().sum().item() / 8
        with run.checkpointer.ema.swap():
            average = run.net(x).square().sum().item() / 8
    assert raw != average and validator.metrics_processor is heard
    (first, second) = heard.rows
    assert first == (5, {"validation_metrics/loss": raw})
    assert second[0] == 5 and second[1]["ema/validation_loss"] == average
    assert second[1]["ema/num_updates"] == 5

    net = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="this model has no average"):
        EMA.of([net])


# ---------------------------------------------------------------------- on two ranks


@pytest.mark.dist
@pytest.mark.shows("torchtitan", "FSDP2")
def test_example_is_killed_and_goes_on(tmp_path: Path) -> None:
    example = (ROOT / "examples" / "torchtitan_component.py", "--out", tmp_path, "--steps", "210")
    # The container is an optimizer, too: two of them step at a time.
    killed = execute(*torchrun(2), Path(__file__).with_name("killed.py"), "250", *example)
    assert killed.code != 0 and "updates" not in killed.out
    assert (tmp_path / "checkpoint" / "step-100" / ".metadata").is_file()
    again = execute(*torchrun(2), *example).good()
    assert "210 updates, loss" in again.out
