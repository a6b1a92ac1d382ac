"""The callback against Lightning's own, in one process; and what it does beside that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.launch.programs import ROOT, execute, needs_deepspeed, torchrun

lightning = pytest.importorskip("lightning", reason="of make test-stacks: pip install lightning")
from lightning.pytorch.callbacks import EMAWeightAveraging as Theirs  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import DeepSpeedStrategy  # noqa: E402

from sharded_ema import ShardedEMA  # noqa: E402
from sharded_ema.errors import (  # noqa: E402
    CheckpointWriteError,
    ConfigError,
    EMAWarning,
    SwapError,
)
from sharded_ema.integrations.lightning import EMAWeightAveraging  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    # Of Lightning, where a run goes on without the ModelCheckpoint that has saved.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),
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
        {"decay": 0.5, "update_every_n_steps": 0, "update_starting_at_epoch": 1},
        {"decay": 0.9, "update_every_n_steps": 7, "update_starting_at_epoch": 2},
        {
            "decay": 0.9,
            "update_every_n_steps": 4,
            "update_starting_at_step": 50,
            "use_buffers": False,
        },
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.filterwarnings("ignore:.*running statistics:sharded_ema.errors.EMAWarning")
@pytest.mark.shows("lightning", "one process")
def test_200_steps_as_lightnings_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    history = History()
    theirs = fit(tmp_path, Theirs(**settings))
    ours = fit(tmp_path, EMAWeightAveraging(**settings), history)
    assert ours.train_loss == theirs.train_loss
    expected = plain_loop(history.states, **settings)
    for name, value in ours.state_dict().items():
        # Without use_buffers the model has kept its own, and Lightning's has those of an update.
        if name != COUNTERS and (settings.get("use_buffers", True) or "running" not in name):
            assert torch.equal(value, expected[name]), name
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=2e-6, atol=2e-6)
    begun = 1 + 2 * (settings.get("update_starting_at_step", 0) // 40)  # sanity checking saw one
    if not settings.get("update_every_n_steps", 1):
        begun += 2 * settings["update_starting_at_epoch"] + 2  # Lightning validates before it
    for mine, other in zip(ours.seen[begun:], theirs.seen[begun:], strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)


def every_epoch(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, **settings)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = fit(tmp_path, EMAWeightAveraging(decay=0.9), every_epoch(tmp_path))
    first = tmp_path / "epoch=1.ckpt"
    callback = EMAWeightAveraging(decay=0.9)
    again = fit(tmp_path, callback, resume=first)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert callback.ema is not None and callback.ema.num_updates == 199
    assert again.train_loss == whole.train_loss[80:]
    assert sorted(path.name for path in tmp_path.glob("*.ema")) == [
        f"epoch={epoch}.ckpt.ema" for epoch in range(5)
    ]


def test_the_file_holds_what_lightnings_own_puts_there(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    fit(ours, EMAWeightAveraging(decay=0.9), every_epoch(ours), max_epochs=2)
    fit(theirs, Theirs(decay=0.9), every_epoch(theirs), max_epochs=2)
    mine, other = (torch.load(folder / "epoch=1.ckpt") for folder in (ours, theirs))
    assert mine.keys() == other.keys()
    assert mine["averaging_state"] == other["averaging_state"]
    for key in ("state_dict", "current_model_state"):
        assert mine[key].keys() == other[key].keys()
        for name, value in other[key].items():
            if name != COUNTERS:
                torch.testing.assert_close(mine[key][name], value, rtol=2e-6, atol=2e-6)
    assert not torch.equal(
        mine["state_dict"]["net.0.weight"], mine["current_model_state"]["net.0.weight"]
    )

    # Each goes on with the other's file; ours also without what lies beside it.
    expected = fit(tmp_path, Theirs(decay=0.9), max_epochs=3).state_dict()
    for path in ours.glob("*.ema"):
        path.rename(path.with_suffix(".away"))
    crossed = [
        fit(tmp_path, EMAWeightAveraging(decay=0.9), resume=ours / "epoch=1.ckpt", max_epochs=3),
        fit(tmp_path, Theirs(decay=0.9), resume=ours / "epoch=1.ckpt", max_epochs=3),
        fit(tmp_path, EMAWeightAveraging(decay=0.9), resume=theirs / "epoch=1.ckpt", max_epochs=3),
    ]
    for lit in crossed:
        for name, value in lit.state_dict().items():
            if name != COUNTERS:
                torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=2e-6)


def test_run_that_kept_no_average(tmp_path: Path) -> None:
    fit(tmp_path, every_epoch(tmp_path), max_epochs=1)
    callback = EMAWeightAveraging(schedule=0.9)
    with pytest.warns(
        EMAWarning, match=r"epoch=0\.ckpt\.ema does not exist, so the average starts"
    ):
        fit(tmp_path, callback, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert callback.ema is not None and callback.ema.num_updates == 40


def test_average_of_another_checkpoint_is_told(tmp_path: Path) -> None:
    fit(tmp_path, EMAWeightAveraging(), every_epoch(tmp_path), max_epochs=2)
    (tmp_path / "epoch=0.ckpt.ema").rename(tmp_path / "away")
    (tmp_path / "epoch=1.ckpt.ema").rename(tmp_path / "epoch=0.ckpt.ema")
    with pytest.warns(EMAWarning, match="saved at step 80 and .* at step 40"):
        fit(tmp_path, EMAWeightAveraging(), resume=tmp_path / "epoch=0.ckpt", max_epochs=3)


def test_rotation_removes_the_average_and_links_find_it(tmp_path: Path) -> None:
    keep = ModelCheckpoint(
        dirpath=tmp_path, filename="{epoch}", monitor="epoch", mode="max", save_last="link"
    )
    fit(tmp_path, EMAWeightAveraging(), keep, max_epochs=3)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["epoch=2.ckpt", "epoch=2.ckpt.ema", "last.ckpt"]
    callback = EMAWeightAveraging()
    fit(tmp_path, callback, resume=tmp_path / "last.ckpt", max_epochs=4)
    assert callback.ema is not None and callback.ema.num_updates == 159


class Interrupted(lightning.Callback):
    """Stops in the middle of a validation, or tries to save there."""

    def __init__(self, save: Path | None = None, weights_only: bool = False) -> None:
        self.save, self.weights_only = save, weights_only

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.sanity_checking:
            return
        if self.save is not None:
            trainer.save_checkpoint(self.save, weights_only=self.weights_only)
        raise RuntimeError("interrupted")


def test_exception_in_validation_brings_the_weights_back(tmp_path: Path) -> None:
    lit, history, callback = Lit(), History(), EMAWeightAveraging(decay=0.9)
    keep = ModelCheckpoint(tmp_path, save_on_exception=True)
    t = trainer(tmp_path, callback, history, Interrupted(), keep)
    with pytest.raises(RuntimeError, match="interrupted"):
        t.fit(lit, batches(40), batches(2))
    for name, value in history.states[-1].items():
        assert torch.equal(lit.state_dict()[name], value)
    assert not torch.equal(lit.seen[-1], history.states[-1]["net.0.weight"])
    (saved,) = tmp_path.glob("*.ckpt")  # which ModelCheckpoint did after that
    assert saved.with_name(f"{saved.name}.ema").is_dir()
    whole = torch.load(saved)["current_model_state"]
    assert torch.equal(whole["net.0.weight"], history.states[-1]["net.0.weight"])
    t.callbacks.remove(next(c for c in t.callbacks if isinstance(c, Interrupted)))
    t.fit(lit, batches(40), ckpt_path=saved)  # and it can be used again
    assert callback.ema is not None and callback.ema.num_updates == t.global_step - 1


@pytest.mark.parametrize("weights_only", [False, True])
def test_save_in_validation_is_refused(tmp_path: Path, weights_only: bool) -> None:
    path = tmp_path / "x.ckpt"
    with pytest.raises(SwapError, match="saved while the average stands in"):
        fit(tmp_path, EMAWeightAveraging(), Interrupted(path, weights_only), max_epochs=1)
    assert not path.exists() and not list(tmp_path.glob("*.ema"))


def test_checkpoint_is_evaluated_by_its_average(tmp_path: Path) -> None:
    losses = fit(
        tmp_path, EMAWeightAveraging(decay=0.9), every_epoch(tmp_path), max_epochs=2
    ).losses
    for run in ("validate", "test"):
        t = trainer(tmp_path, EMAWeightAveraging(decay=0.9))
        (found,) = getattr(t, run)(Lit(), batches(2), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert found in ({"val_loss": losses["val_loss"]}, {"test_loss": losses["val_loss"]})


class Heard(lightning.pytorch.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.heard.append(metrics)


def test_metrics_reach_the_loggers(tmp_path: Path) -> None:
    for prefix in ("ema/", "average_", None):
        log = Heard()
        fit(tmp_path, EMAWeightAveraging(decay=0.9, prefix=prefix), logger=log, max_epochs=1)
        updates = [m[f"{prefix}num_updates"] for m in log.heard if f"{prefix}decay/ema" in m]
        assert updates == ([9, 19, 29, 39] if prefix else [])


def test_schedules_of_this_library_and_several_averages(tmp_path: Path) -> None:
    history = History()
    callback = EMAWeightAveraging(
        schedule={"fast": 0.5, "slow": "warmup:0.99"}, profile="slow", buffers="copy"
    )
    lit = Lit()
    start = {k: v.clone() for k, v in lit.state_dict().items()}
    with pytest.warns(EMAWarning, match="running statistics"):
        trainer(tmp_path, callback, history, max_epochs=1).fit(lit, batches(40))
    for n, state in enumerate(history.states, 1):
        for name in start:
            if "weight" in name or "bias" in name:
                start[name].lerp_(state[name], 1 - min(0.99, (1 + n) / (10 + n)))
    assert torch.equal(lit.net[0].weight, start["net.0.weight"])
    assert callback.ema is not None
    callback.ema.copy_to("fast")  # usable after training
    assert not torch.equal(lit.net[0].weight, start["net.0.weight"])


def test_should_update_may_be_overridden(tmp_path: Path) -> None:
    def of(base: type) -> Any:
        class Odd(base):
            def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
                return step_idx is not None and step_idx >= 30 and step_idx % 2 == 1

        return Odd(decay=0.9)

    ours, theirs = (fit(tmp_path, of(base), max_epochs=2) for base in (EMAWeightAveraging, Theirs))
    for name, value in theirs.state_dict().items():
        if name != COUNTERS:
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay": 0.9, "schedule": 0.9}, "pass one"),
        ({"start_step": 5}, "start_step is called update_starting_at_step here"),
        ({"avg_fn": max}, "no option avg_fn; .* shadow_dtype"),
        ({"update_every_n_steps": 0}, "pass update_starting_at_epoch as well"),
        ({"decay": 1.5}, "must lie in"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EMAWeightAveraging(**settings)


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="saves already"):
        fit(tmp_path, EMAWeightAveraging(), EMAWeightAveraging())


def test_a_version_that_nobody_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning, "__version__", "3.1.0")
    with pytest.warns(
        EMAWarning, match=r"lightning 3\.1\.0 is installed, .* lightning>=2\.6,<2\.7"
    ):
        fit(tmp_path, EMAWeightAveraging(), max_epochs=1)


def test_updates_of_epochs_are_refused_under_deepspeed(tmp_path: Path) -> None:
    callback = EMAWeightAveraging(update_starting_at_epoch=1)
    t = trainer(tmp_path, callback)
    t.strategy.__class__ = type("Engine", (DeepSpeedStrategy,), {})
    with pytest.raises(ConfigError, match="not possible under DeepSpeed"):
        callback.setup(t, Lit(), "fit")


@pytest.mark.shows("Fabric", "one process")
def test_fabric_keeps_it_on_one_rank_and_asks_for_three_lines_on_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net = nn.Linear(2, 2)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    ema = ShardedEMA(model, 0.5)
    ema.attach(optimizer)

    def step() -> Tensor:
        fabric.backward(model(torch.ones(1, 2)).square().mean())
        optimizer.step()
        with ema.swap():
            return net.weight.detach().clone()

    before, state = step(), {"model": model, "ema": ema}
    fabric.save(tmp_path / "x.ckpt", state)
    assert not torch.equal(step(), before)
    fabric.load(tmp_path / "x.ckpt", state)
    with ema.swap():
        assert torch.equal(net.weight, before)

    monkeypatch.setattr(ema._model.ranks, "size", 2)
    with pytest.raises(CheckpointWriteError, match=r"ema\.save\(f'\{path\}\.ema', step="):
        fabric.save(tmp_path / "y.ckpt", state)
    assert not (tmp_path / "y.ckpt").exists()
    launched = {"__name__": "lightning.fabric.strategies.launchers.multiprocessing"}
    monkeypatch.setattr(ema._model, "not_shared", dict)  # that these two ranks are none
    exec("def run(function): return function()", launched)
    assert launched["run"](lambda: ema.state_dict()), "a user's program, launched by Fabric"


# ---------------------------------------------------------------------- on two ranks

HERE = Path(__file__).parent
LIGHTNING_ON_CPUS = {"PYTHONWARNINGS": "ignore"}


@pytest.mark.dist
@pytest.mark.shows("lightning", "FSDP2")
def test_trainer_example_is_killed_and_goes_on(tmp_path: Path) -> None:
    example = (ROOT / "examples" / "lightning_trainer.py", "--out", tmp_path, "--epochs", "3")
    killed = execute(*torchrun(2), HERE / "killed.py", "130", *example, add=LIGHTNING_ON_CPUS)
    assert killed.code != 0 and "updates" not in killed.out
    assert (tmp_path / "epoch=1-step=112.ckpt.ema").is_dir()
    again = execute(*torchrun(2), *example, add=LIGHTNING_ON_CPUS).good()
    assert "168 updates, loss" in again.out
    left = {"epoch=2-step=168.ckpt", "epoch=2-step=168.ckpt.ema", "last.ckpt"}
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.dist
@pytest.mark.stacks
@pytest.mark.shows("Fabric", "DDP")
def test_fabric_example_is_killed_and_goes_on(tmp_path: Path) -> None:
    example = (ROOT / "examples" / "lightning_fabric.py", "--steps", "300", "--out")
    killed = execute(*torchrun(2), HERE / "killed.py", "250", *example, tmp_path / "killed")
    assert killed.code != 0 and "updates" not in killed.out
    again = execute(*torchrun(2), *example, tmp_path / "killed").good()
    whole = execute(*torchrun(2), *example, tmp_path / "whole").good()
    assert "300 updates, loss" in whole.out
    assert again.out.splitlines()[-1] == whole.out.splitlines()[-1]


@pytest.mark.dist
@pytest.mark.stacks
@pytest.mark.parametrize(
    "strategy",
    ["ddp", pytest.param("fsdp2", marks=pytest.mark.shows("Fabric", "FSDP2"))],
)
def test_fabric_save_refuses_on_all_ranks(tmp_path: Path, strategy: str) -> None:
    done = execute(*torchrun(2), HERE / "fabric_program.py", strategy, tmp_path).good()
    last = done.out.splitlines()[-1]
    assert last.startswith("same True")
    assert last.count("fabric.save() writes the state of rank 0 alone") == 2
    assert last.endswith("['latest', 'y.ckpt', 'y.ckpt.ema']")


def under(strategy: str, backend: str) -> Any:
    """A case of one of Lightning's strategies."""
    needs = [needs_deepspeed] if strategy.startswith("zero") else []
    return pytest.param(strategy, marks=[pytest.mark.shows("lightning", backend), *needs])


@pytest.mark.dist
@pytest.mark.stacks
@pytest.mark.parametrize(
    "strategy",
    [
        under("ddp", "DDP"),
        under("fsdp1", "FSDP1"),
        under("fsdp2", "FSDP2"),
        *(under(f"zero{stage}", f"ZeRO-{stage}") for stage in (1, 2, 3)),
    ],
)
def test_under_strategies(tmp_path: Path, strategy: str) -> None:
    program = (HERE / "lightning_program.py", strategy, tmp_path)
    execute(*torchrun(2), *program, add=LIGHTNING_ON_CPUS).good()
    found = json.loads((tmp_path / "found.json").read_text())
    names = [f"step={step}.ckpt" for step in (3, 4, 5, 6)]
    beside = [] if strategy.startswith("zero") else [f"{name}.ema" for name in names]
    assert found == {
        "validations saw the average": [True] * 6,
        "weights were back": [True] * 6,
        "the model holds the average": True,
        "files": sorted(names + beside),
        "inside": ["ema"] * (not beside),
        "updates": 5,
        "resumed loss equal": True,
        "resumed weights equal": True,
        "taken out of the file": strategy == "ddp",
        "evaluated outside of fit()": strategy in ("fsdp1", "fsdp2"),
    }
