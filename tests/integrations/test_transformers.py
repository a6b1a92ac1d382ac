"""with_ema() against transformers' own Trainer; on several ranks as well, by trainer_run.py."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_ema import EMAWarning, ShardedEMA
from sharded_ema.errors import ConfigError, StateError

pytest.importorskip("transformers", minversion="5.23", reason="pip install 'transformers>=5.23'")
pytest.importorskip("accelerate", reason="transformers' Trainer is built on it")

import safetensors.torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from sharded_ema.integrations import transformers as integration
from sharded_ema.integrations.transformers import with_ema
from tests.launch.programs import ROOT, execute, needs_deepspeed, torchrun

ROWS = [{"x": torch.full((8,), i / 64), "labels": torch.tensor(1.0)} for i in range(64)]
SETS = {"a": ROWS[:8], "b": ROWS[8:24]}

# Runs are so short that an average is mostly its seed; test_health.py looks at what is said of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:average .* spans:sharded_ema.errors.EMAWarning",
    "ignore:.*pin_memory.*:UserWarning",
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.layer(x)[:, 0]
        return {"loss": (out - labels).square().mean(), "logits": out}


class PlainLoop(TrainerCallback):
    """The averages after 0, 1, ... steps; with several trainers the runs follow each other."""

    def __init__(self, decay: float = 0.9) -> None:
        self.share, self.averages = 1 - decay, list[list[Tensor]]()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
    ) -> None:
        self.averages = self.averages or [[p.detach().clone() for p in model.parameters()]]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        pairs = zip(self.averages[-1], model.parameters(), strict=True)
        self.averages.append([a.lerp(p.detach(), self.share) for a, p in pairs])

    def check(self, trainer: Any, step: int = -1, profile: str | None = None) -> None:
        with trainer.ema.swap(profile):
            assert same(trainer.model.parameters(), self.averages[step])


def same(found: Any, wanted: Any) -> bool:
    return all(map(torch.equal, found, wanted))


def weights_of(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(*callbacks: Any, kind: type[Trainer] = Trainer, ema: bool = True, **more: Any) -> Any:
        mine = {k: more.pop(k) for k in ("schedule", "prefix", "evaluate") if k in more}
        data = more.pop("eval_dataset", ROWS[:16])
        common = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 0.01,
            "optim": "sgd",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        args = TrainingArguments(**common | more)
        trainer = kind(
            Net(), args, train_dataset=ROWS, eval_dataset=data, callbacks=list(callbacks)
        )
        return with_ema(trainer, mine.pop("schedule", 0.9), **mine) if ema else trainer

    return make


def loss(trainer: Trainer, weights: list[Tensor], rows: list[dict[str, Tensor]]) -> float:
    named = dict(zip(dict(trainer.model.named_parameters()), weights, strict=True))
    batch = tuple(torch.stack([row[key] for row in rows]) for key in ("x", "labels"))
    return float(torch.func.functional_call(trainer.model, named, batch)["loss"])


# ---------------------------------------------------------------------- training, saving, resuming


@pytest.mark.shows("transformers", "one process")
def test_a_run_and_its_files(make: Make, tmp_path: Path) -> None:
    loop = PlainLoop()
    trainer = make(loop)
    assert trainer.ema is None
    trainer.train()
    loop.check(trainer)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert (checkpoint / "ema" / "manifest.json").is_file()
    rows = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [r["ema/num_updates"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    assert rows[-1]["ema/decay/ema"] == 0.9


@pytest.mark.parametrize("by", [True, "path"])
def test_a_killed_run_goes_on(make: Make, tmp_path: Path, by: bool | str) -> None:
    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise InterruptedError

    loop, whole = PlainLoop(), PlainLoop()
    make(whole, output_dir=str(tmp_path / "whole")).train()
    with pytest.raises(InterruptedError):
        make(loop, Kill()).train()
    del loop.averages[3:]
    again = make(loop)
    again.train(str(tmp_path / "run" / "checkpoint-2") if by == "path" else by)
    loop.check(again)
    assert same(loop.averages[-1], whole.averages[-1])
    assert again.ema.num_updates == 4


def test_a_run_without_an_average_is_said_and_seeds(make: Make) -> None:
    make(ema=False, max_steps=2).train()
    loop = PlainLoop()
    again = make(loop)
    with pytest.warns(EMAWarning, match="has no average") as seen:
        again.train(resume_from_checkpoint=True)
    assert any("has no average" in str(w.message) and w.filename == __file__ for w in seen)
    loop.check(again)  # whose first is that of the restored weights
    assert again.ema.num_updates == 2


def test_a_second_train_begins_another_average(make: Make) -> None:
    trainer = make(save_strategy="no")
    trainer.train()
    first = trainer.ema
    loop = PlainLoop()
    trainer.add_callback(loop)
    trainer.train()
    assert trainer.ema is not first and trainer.ema.num_updates == 4
    loop.check(trainer)
    with pytest.raises(StateError, match="closed"):
        first.update()


def test_is_there_before_the_push_and_the_rotation(make: Make, tmp_path: Path) -> None:
    class Pushing(Trainer):
        pushed: list[tuple[str, bool]] = []  # noqa: RUF012

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            self.pushed.append(
                (Path(checkpoint_folder).name, Path(checkpoint_folder, "ema").is_dir())
            )

    trainer = make(kind=Pushing, save_total_limit=1)
    trainer.args.push_to_hub = True
    trainer.train()
    assert trainer.pushed == [("checkpoint-2", True), ("checkpoint-4", True)]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-4"]


def test_save_model_writes_the_average(make: Make, tmp_path: Path) -> None:
    loop = PlainLoop(0.5)
    trainer = make(loop, schedule={"fast": 0.5, "slow": 0.99}, save_strategy="no")
    with pytest.raises(StateError, match="before training"):
        trainer.save_model(str(tmp_path / "out"), average=True)
    trainer.train()
    raw = weights_of(trainer)
    trainer.save_model(str(tmp_path / "out"), average=True, profile="fast")
    trainer.save_model(str(tmp_path / "raw"))
    out = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert same((out[n] for n, _ in trainer.model.named_parameters()), loop.averages[-1])
    out = safetensors.torch.load_file(tmp_path / "raw" / "model.safetensors")
    assert same((out[n] for n, _ in trainer.model.named_parameters()), raw)
    assert not (tmp_path / "raw" / "ema").exists()


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_steps=3
    )
    model = peft.get_peft_model(Net(), config)
    trainer: Any = with_ema(Trainer(model, args, train_dataset=ROWS), 0.9)
    trainer.train()
    with trainer.ema.swap():
        want = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.save_model(str(tmp_path / "out"), average=True)
    opened = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "out"))
    got = dict(opened.named_parameters())
    assert len(want) == 2 and same((got[n] for n in want), want.values())
    assert (tmp_path / "checkpoint-3" / "ema").is_dir()


# ---------------------------------------------------------------------- evaluating


class Events(TrainerCallback):
    def __init__(self) -> None:
        self.evaluated: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.evaluated.append(dict(metrics))


def test_several_sets(make: Make) -> None:
    loop, events = PlainLoop(), Events()
    trainer = make(loop, events, eval_dataset=SETS, save_strategy="no")
    assert "eval_ema_a_loss" not in trainer.evaluate()  # there is none yet
    trainer.train()
    events.evaluated.clear()
    found = trainer.evaluate()
    raw = weights_of(trainer)
    for name, rows in SETS.items():
        assert found[f"eval_{name}_loss"] == pytest.approx(loss(trainer, raw, rows))
        average = pytest.approx(loss(trainer, loop.averages[-1], rows))
        assert found[f"eval_ema_{name}_loss"] == average
    losses = [sorted(k for k in e if k.endswith("loss")) for e in events.evaluated]
    assert losses == [["eval_a_loss", "eval_ema_a_loss"], ["eval_b_loss", "eval_ema_b_loss"]]
    assert trainer.evaluate(ROWS[:4], metric_key_prefix="test").keys() >= {
        "test_loss",
        "test_ema_loss",
    }


def test_evaluate_overridden_and_names_of_trl(make: Make) -> None:
    """An override that evaluates a second set, and a log that adds numbers as TRL's do."""

    class Own(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            assert "eval_loss" in metrics
            return metrics | super().evaluate(SETS["b"], metric_key_prefix="eval_b")

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if any(name.startswith("eval") for name in logs):
                logs.update({"eval_norm": self.model.layer.weight.detach().norm().item()})
            super().log(logs, start_time)

    class Tracker(TrainerCallback):
        seen: dict[str, float] = {}  # noqa: RUF012

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            self.seen |= logs

    loop, tracker = PlainLoop(), Tracker()
    trainer = make(loop, tracker, kind=Own, save_strategy="no")
    trainer.train()
    tracker.seen.clear()
    trainer.state.log_history.clear()
    found = trainer.evaluate()
    logged = {k: v for row in trainer.state.log_history for k, v in row.items()}
    for where in (found, logged, tracker.seen):
        assert where["eval_norm"] == trainer.model.layer.weight.detach().norm().item()
        assert where["eval_ema_norm"] == float(loop.averages[-1][0].norm())
        assert where.keys() >= {"eval_loss", "eval_ema_loss", "eval_b_loss", "eval_ema_b_loss"}


def test_early_stopping_by_the_average(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(
        EarlyStoppingCallback(early_stopping_patience=1),
        max_steps=9,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
        greater_is_better=True,  # of what falls
    )
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.best_global_step == 1
    assert "did not find" not in caplog.text


def test_several_averages_and_none(make: Make) -> None:
    both = {"fast": 0.5, "slow": 0.99}
    trainer = make(schedule=both, prefix="avg/", save_strategy="no")
    trainer.train()
    assert trainer.evaluate().keys() >= {"eval_ema_fast_loss", "eval_ema_slow_loss"}
    assert "avg/decay/slow" in trainer.state.log_history[0]
    trainer = make(schedule=both, evaluate=["slow"], save_strategy="no")
    trainer.train()
    assert "eval_ema_slow_loss" in (found := trainer.evaluate())
    assert "eval_ema_fast_loss" not in found
    trainer = make(evaluate=False, save_strategy="no")
    trainer.train()
    assert not any("ema" in name for name in trainer.evaluate())


def test_an_error_in_the_middle_restores_the_weights(make: Make) -> None:
    class Fails(Trainer):
        calls = -1

        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 3:  # two batches for the weights; this is the average's second
                raise RuntimeError("a bad row")
            return super().prediction_step(*args, **kwargs)

    trainer = make(kind=Fails, save_strategy="no")
    trainer.train()
    before = weights_of(trainer)
    with pytest.raises(RuntimeError, match="a bad row"):
        trainer.evaluate()
    assert same(trainer.model.parameters(), before)
    assert "eval_ema_loss" in trainer.evaluate()


# ---------------------------------------------------------------------- the best model

BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 6,
}


def test_the_best_checkpoint_has_its_average(make: Make) -> None:
    loop = PlainLoop()
    trainer = make(loop, **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 2
    loop.check(trainer, 2)


def test_the_best_checkpoint_is_of_a_run_without_one(make: Make) -> None:
    make(ema=False, **BEST | {"max_steps": 2}).train()
    trainer = make(**BEST)
    with pytest.warns(EMAWarning) as seen:
        trainer.train(resume_from_checkpoint=True)
    assert sum("the best checkpoint" in str(w.message) for w in seen) == 1
    with trainer.ema.swap():
        average = weights_of(trainer)
    assert same(average, weights_of(trainer))


# ---------------------------------------------------------------------- refused, and warned of


def test_refused(make: Make) -> None:
    trainer = make()
    with pytest.raises(ConfigError, match=r"with_ema\(\) saves already"):
        with_ema(trainer, 0.9)
    plain = make(ema=False)
    with pytest.raises(ConfigError, match=r"trainer = with_ema\(trainer, 0\.9999\)"):
        with_ema(plain, ShardedEMA(plain.model, 0.9))
    with pytest.raises(ConfigError, match="slower"):
        with_ema(plain, {"slow": 0.9}, evaluate=["slower"])
    with pytest.raises(ConfigError):
        with_ema(plain, 1.5)
    with pytest.raises(TypeError, match="decay"):
        with_ema(plain, 0.9, decay=0.9)

    class Late(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with_ema(plain, 0.9)

    plain.add_callback(Late())
    with pytest.raises(ConfigError, match=r"before trainer\.train"):
        plain.train()


def test_a_version_that_nobody_tried(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make(ema=False)
    monkeypatch.setattr(integration.transformers, "__version__", "6.1.0")
    with pytest.warns(EMAWarning, match=r"transformers 6\.1\.0 is installed.*>=5\.23"):
        with_ema(plain, 0.9)


def test_nothing_is_said_of_a_good_run(make: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EMAWarning)
        trainer = make(schedule=0.5, max_steps=20, save_steps=20)
        trainer.train()
        trainer.evaluate()
        trainer.ema.close()


# ---------------------------------------------------------------------- several ranks

NAMES = {"ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2"} | {
    f"zero{n}": f"ZeRO-{n}" for n in "123"
}
KINDS = {"hf": "transformers", "seq2seq": "transformers", "sft": "trl", "dpo": "trl"}
RUNS = [
    *((backend, "hf") for backend in NAMES),
    *(("ddp", kind) for kind in KINDS if kind != "hf"),
]


@pytest.mark.stacks
@needs_deepspeed
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        pytest.param(b, k, id=f"{b}-{k}", marks=pytest.mark.shows(KINDS[k], NAMES[b]))
        for b, k in RUNS
    ],
)
def test_on_two_ranks(backend: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="pip install 'trl>=1.16'")
    execute(*torchrun(2), "-m", "tests.integrations.trainer_run", backend, tmp_path, kind).good()
    found = json.loads((tmp_path / "found.json").read_text())
    wrong = [name for name, value in found.items() if value is False]
    assert wrong == []
    assert found["best"] == 2 and found["updates"] == 6 and found["killed"]
    assert sum(found["shadow"]) == 4 * found["parameters"], "each rank keeps its share"
    assert found["averages"] == ["ema"] and found["checkpoints"].count("checkpoint-2") == 1
    assert [w for w in found["warned"] if "spans" not in w] == []
    names = {"eval_a_loss", "eval_ema_a_loss", "ema/num_updates", "ema/decay/ema"}
    if kind in ("sft", "dpo"):
        names |= {"eval_mean_token_accuracy", "eval_ema_mean_token_accuracy"}
    assert names <= set(found["history"]) and names <= set(found["callbacks"])
    assert found["evaluated"][0] == ["eval_a_loss", "eval_ema_a_loss"]


@pytest.mark.dist
@pytest.mark.shows("transformers", "DDP")
def test_the_example_is_killed_and_goes_on(tmp_path: Path) -> None:
    example, killer = (
        ROOT / "examples" / "transformers_trainer.py",
        Path(__file__).with_name("killed.py"),
    )
    out = ("--out", tmp_path, "--steps", "12")
    done = execute(*torchrun(2), killer, "9", example, *out)
    assert done.code != 0 and (tmp_path / "checkpoint-8" / "ema").is_dir()
    done = execute(*torchrun(2), example, *out).good()
    assert f"goes on from {tmp_path}/checkpoint-8" in done.out
    assert "12 updates" in done.out and "eval_ema_loss" in done.out
    assert (tmp_path / "average" / "config.json").is_file()
