"""The training program under FSDP1, HSDP, tensor parallelism and accelerate.

Each run takes another one up, so that few starts of torchrun cover saving and resuming of each
way, on other numbers of ranks. All are held against one process that never stops.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.launch.programs import (
    TrainingRun,
    accelerate,
    assert_same,
    average_of,
    consolidate,
    finished,
    weights_of,
)

pytestmark = pytest.mark.dist

DECAY = 0.9
FLAGS = (
    *("--kv-heads", "2"),  # can be divided
    # The average moves where the weights are saved, so that it can be made anew of them.
    *("--ema", "--ema-decay", str(DECAY), "--ema-start-step", "2", "--ema-update-every", "2"),
)


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A run, and the checkpoint it has taken up."""

    run: TrainingRun
    source: Path
    step: int


def resumed(
    folder: Path, corpus: Path, ranks: int, way: str, source: TrainingRun, *flags: str
) -> Resumed:
    checkpoint = source.checkpoint(2)
    flags = ("--parallel", way, *FLAGS, "--resume", str(checkpoint), *flags)
    return Resumed(finished(folder, way, corpus, ranks, *flags), checkpoint, 2)


def resumed_by_accelerate(
    folder: Path, corpus: Path, config: str, source: TrainingRun, step: int
) -> Resumed:
    checkpoint, out = source.checkpoint(step), folder / f"accelerate_{config}"
    start = None if config == "ddp" else Path(__file__).with_name("sharding_on_cpus.py")
    flags = ("--data", corpus, "--out", out, "--resume", checkpoint, "--accumulation", "3")
    done = accelerate(config, *FLAGS, *flags, start=start).good()
    return Resumed(TrainingRun(out, done.out, done.err), checkpoint, step)


# ---------------------------------------------------------------------- the runs that tests share


@pytest.fixture(scope="module")
def plain(folder: Path, corpus: Path) -> TrainingRun:
    """One process: the losses that there should be."""
    return finished(folder, "plain", corpus, None, *FLAGS)


@pytest.fixture(scope="module")
def fsdp1(folder: Path, corpus: Path) -> TrainingRun:
    flags = ("--accumulation", "3", "--activation-checkpointing")
    return finished(folder, "fsdp1", corpus, 2, "--parallel", "fsdp1", *FLAGS, *flags)


@pytest.fixture(scope="module")
def tp(folder: Path, corpus: Path, fsdp1: TrainingRun) -> Resumed:
    return resumed(folder, corpus, 4, "tp", fsdp1, "--accumulation", "3")


@pytest.fixture(scope="module")
def hsdp(folder: Path, corpus: Path, fsdp1: TrainingRun) -> Resumed:
    """On ranks whose shares of a batch differ."""
    return resumed(folder, corpus, 4, "hsdp", fsdp1)


@pytest.fixture(scope="module")
def ddp_by_accelerate(folder: Path, corpus: Path, fsdp1: TrainingRun) -> Resumed:
    return resumed_by_accelerate(folder, corpus, "ddp", fsdp1, 2)


@pytest.fixture(scope="module")
def fsdp2_by_accelerate(folder: Path, corpus: Path, tp: Resumed) -> Resumed:
    return resumed_by_accelerate(folder, corpus, "fsdp2", tp.run, 4)


@pytest.fixture(scope="module")
def fsdp1_by_accelerate(folder: Path, corpus: Path, hsdp: Resumed) -> Resumed:
    return resumed_by_accelerate(folder, corpus, "fsdp1", hsdp.run, 4)


# ---------------------------------------------------------------------- training


def check_steps(run: TrainingRun, plain: TrainingRun, first: int) -> None:
    """Losses, averaged ones too, and norms before clipping are those of one process."""
    expected = {key: value for key, value in plain.losses().items() if key[0] >= first}
    # 1e-3 is what is promised; what is left is the order of sums.
    assert run.losses() == pytest.approx(expected, rel=0, abs=1e-5)
    for step, row in run.rows().items():
        assert row["grad_norm"] == pytest.approx(plain.rows()[step]["grad_norm"], rel=1e-4)
    last = run.rows()[6]
    assert last["raw_loss"] != last["ema_loss/ema"]


def check_average(run: TrainingRun, source: Path, step: int) -> None:
    """The stored average is a plain loop over the raw weights in the stock checkpoints."""
    average = average_of(source)
    for updated in range(step + 2, 7, 2):
        weights = weights_of(run.checkpoint(updated))
        for name, value in average.items():
            value.lerp_(weights[name.removeprefix("ema.")], 1 - DECAY * DECAY)
    assert_same(average_of(run.checkpoint(6)), average)


def check_text(run: TrainingRun) -> None:
    """The export writes in bfloat16 what the average, gathered in training, has written."""
    from training.evaluation import greedy

    export = consolidate(run)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16)
    wanted = json.loads((run.out / "summary.json").read_text())["generated"]["ema"]
    assert len(wanted) == 24
    assert greedy(model, [*b"def "], 24) == wanted


def test_fsdp1_from_scratch(fsdp1: TrainingRun, plain: TrainingRun) -> None:
    assert "parallel   fsdp1, world size 2" in fsdp1.text
    check_steps(fsdp1, plain, 1)
    check_average(fsdp1, fsdp1.checkpoint(2), 2)
    check_text(fsdp1)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("tp", "tp (2 data parallel x 2 tensor parallel), world size 4"),
        ("hsdp", "hsdp (2 replicas x 2 shards), world size 4"),
        ("ddp_by_accelerate", "accelerate (DDP), world size 2"),
        # What accelerate shards is trained in tests/integrations, too.
        pytest.param(
            "fsdp2_by_accelerate", "accelerate (FSDP2), world size 2", marks=pytest.mark.long
        ),
        pytest.param(
            "fsdp1_by_accelerate", "accelerate (FSDP1), world size 2", marks=pytest.mark.long
        ),
    ],
)
def test_taking_up_another_way(
    way: str, words: str, plain: TrainingRun, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(way)
    assert f"parallel   {words}" in found.run.text
    assert f"at step {found.step}" in found.run.line("resume ")
    check_steps(found.run, plain, found.step + 1)
    check_average(found.run, found.source, found.step)
    check_text(found.run)


# ---------------------------------------------------------------------- wrong use


def test_accelerate_that_does_not_shard_is_refused(corpus: Path, tmp_path: Path) -> None:
    """On CPUs accelerate makes DDP of FSDP, and says nothing."""
    done = accelerate("fsdp2", *FLAGS, "--data", corpus, "--out", tmp_path / "out", ranks=1)
    assert done.code != 0
    (line,) = done.errors("train.py")
    assert "asked for FSDP2, but has made DDP" in line and "--parallel fsdp2" in line
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "none has no plan"),
        ({"base_model_tp_plan": {"experts": "grouped_gemm"}}, "a plan with grouped_gemm"),
        ({"base_model_tp_plan": {"q": "colwise"}, "num_key_value_heads": 3}, "key_value_heads, 3"),
    ],
)
def test_models_that_cannot_be_divided(config: dict[str, object], words: str) -> None:
    from training.engines.torch import tensor_plan
    from training.ranks import RunError

    model = SimpleNamespace(config=SimpleNamespace(model_type="none", **config))
    with pytest.raises(RunError, match=words):
        tensor_plan(model, 2)
