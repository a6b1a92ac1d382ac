"""The training program under DeepSpeed: real runs of a tiny model on two CPU ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.launch.programs import (
    AVERAGE,
    CONFIGS,
    Check,
    TrainingRun,
    assert_same,
    average_of,
    config_file,
    consolidate,
    deepspeed,
    execute,
    finished,
    needs_deepspeed,
    train,
)

pytestmark = [pytest.mark.dist, needs_deepspeed]

ACCUMULATION = ("--accumulation", "3")
# Writes what DeepSpeed itself takes for the masters at each step of a run.
MASTERS = """
import sys
from pathlib import Path
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
root = Path(sys.argv[1])
for path in sorted(root.glob("step_*")):
    masters = get_fp32_state_dict_from_zero_checkpoint(str(root), path.name)
    masters = {name: value.clone() for name, value in masters.items() if name != "lm_head.weight"}
    save_file(masters, path / "masters.safetensors")
"""


# ---------------------------------------------------------------------- the runs that tests share


@pytest.fixture(scope="module")
def zero3(folder: Path, corpus: Path) -> TrainingRun:
    """Started by torchrun, without a configuration file."""
    return finished(folder, "zero3", corpus, 2, *AVERAGE, "--parallel", "zero3")


@pytest.fixture(scope="module")
def launched(folder: Path, corpus: Path) -> TrainingRun:
    """The same by DeepSpeed's launcher, and with a file."""
    out = folder / "launched"
    done = deepspeed("zero3", *AVERAGE, "--data", corpus, "--out", out).good()
    return TrainingRun(out, done.out, done.err)


@pytest.fixture(scope="module")
def bf16(folder: Path, corpus: Path) -> TrainingRun:
    """ZeRO-1 with 16-bit weights and fp32 masters, three micro-batches a step; all steps kept."""
    return finished(
        *(folder, "bf16", corpus, 2, "--deepspeed", CONFIGS / "zero1.json", "--dtype", "bfloat16"),
        *(*AVERAGE, "--ema-start-step", "1", *ACCUMULATION, "--activation-checkpointing"),
        *("--save-every", "1", "--keep-last", "6"),
    )


# ---------------------------------------------------------------------- from training to export


def test_zero3_gives_the_losses_of_one_process(zero3: TrainingRun, alone: TrainingRun) -> None:
    assert zero3.losses() == pytest.approx(alone.losses(), rel=0, abs=1e-5)
    assert zero3.rows()[6]["raw_loss"] != zero3.rows()[6]["ema_loss/ema"]
    assert "parallel   zero3, world size 2" in zero3.text
    assert "model      llama, 19,808 parameters" in zero3.text  # of which a rank holds a half


def test_clipping_and_rates_are_those_of_one_process(
    zero3: TrainingRun, alone: TrainingRun
) -> None:
    for step, row in alone.rows().items():
        got = zero3.rows()[step]
        assert got["lr"] == row["lr"]
        # Over 1, so that it was clipped.
        assert got["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert alone.rows()[1]["grad_norm"] > 1


def test_zero3_export_loses_what_training_said(zero3: TrainingRun, check_here: Check) -> None:
    for dtype in (None, "bfloat16"):
        done = check_here(consolidate(zero3, dtype), zero3).good()
        assert done.out.count("they agree") == 2


def test_shadow_is_sharded_and_the_run_is_quiet(zero3: TrainingRun) -> None:
    assert zero3.line("shadow ") == "shadow     bytes: rank 0 39,616, rank 1 39,616"
    assert "[INFO]" not in zero3.text and "[WARNING]" not in zero3.text
    assert "FutureWarning" not in zero3.err


def test_checkpoints_are_those_of_deepspeed_with_the_average(zero3: TrainingRun) -> None:
    root = zero3.out / "checkpoints"
    assert (root / "latest").read_text().strip() == "step_000006"
    assert {path.name for path in root.glob("step_*")} == {f"step_00000{n}" for n in (2, 4, 6)}
    last = zero3.checkpoint(6)
    states = {path.name for path in last.glob("*_states.pt")}
    assert states == {
        f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
        for rank in (0, 1)
        for kind in ("model", "optim")
    }
    assert (last / "ema" / "manifest.json").is_file() and (last / "trainer.json").is_file()


def test_launcher_and_file_give_the_same_run(zero3: TrainingRun, launched: TrainingRun) -> None:
    assert launched.line("parallel ") == zero3.line("parallel ")  # ranks, and threads of each
    assert launched.losses() == zero3.losses()
    assert_same(average_of(launched.checkpoint(6)), average_of(zero3.checkpoint(6)))


def test_bf16_average_is_that_of_the_masters(bf16: TrainingRun) -> None:
    """Against a plain loop over the masters in DeepSpeed's own checkpoints."""
    execute("-c", MASTERS, bf16.out / "checkpoints").good()
    masters = [load_file(bf16.checkpoint(n) / "masters.safetensors") for n in range(1, 7)]
    want: dict[str, Tensor] = {name: value.clone() for name, value in masters[0].items()}
    for state in masters[1:]:
        for name, value in want.items():
            value.lerp_(state[name], 1 - 0.9)
    stored = average_of(bf16.checkpoint(6))
    assert_same({key.removeprefix("ema."): value for key, value in stored.items()}, want)
    assert bf16.rows()[6]["ema/num_updates"] == 5


def test_bf16_run_with_accumulation_learns_as_fp32_does(
    bf16: TrainingRun, alone: TrainingRun
) -> None:
    got = [row["train_loss"] for row in bf16.rows().values()]
    want = [row["train_loss"] for row in alone.rows().values()]
    # Rounded weights move the losses by a thousandth.
    assert got == pytest.approx(want, abs=0.01) and got != want
    norms = [row["grad_norm"] for row in bf16.rows().values()]
    assert norms == pytest.approx([row["grad_norm"] for row in alone.rows().values()], rel=0.02)
    assert "computing in bfloat16" in bf16.text


def test_bf16_export_loses_what_training_said(bf16: TrainingRun, check_here: Check) -> None:
    assert check_here(consolidate(bf16), bf16).good().out.count("they agree") == 2


def test_run_without_compiler(folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed compiles nothing unless it is asked to. Stage 0, which no other run has."""
    monkeypatch.setenv("PATH", os.devnull)
    flags = ("--parallel", "zero0", "--dtype", "bfloat16", "--steps", "2")
    run = finished(folder, "zero0", corpus, 1, *flags, *AVERAGE)
    assert run.rows()[2]["ema/num_updates"] == 2


# ---------------------------------------------------------------------- resuming


def test_resumed_run_has_the_bits_of_the_uninterrupted_one(
    zero3: TrainingRun, folder: Path, corpus: Path
) -> None:
    flags = ("--parallel", "zero3", *AVERAGE, "--resume", zero3.checkpoint(4))
    run = finished(folder, "resumed", corpus, 2, *flags)
    assert "resume     from" in run.text and "at step 4" in run.text
    assert run.losses() == {key: value for key, value in zero3.losses().items() if key[0] > 4}
    assert_same(average_of(run.checkpoint(6)), average_of(zero3.checkpoint(6)))


def test_another_number_of_ranks_is_refused(
    zero3: TrainingRun, corpus: Path, tmp_path: Path
) -> None:
    flags = ("--parallel", "zero3", *AVERAGE, "--resume", zero3.checkpoint(4))
    done = train(1, "--data", corpus, "--out", tmp_path, *flags)
    (line,) = done.errors("train.py")
    assert "ranks was 2 and is now 1" in line and "ds_to_universal" in line
    assert f"ema.load({str(zero3.checkpoint(4) / 'ema')!r})" in line
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_resumed() -> None:
    from training import engines

    def layout(stage: int, ranks: int, **zero: object) -> dict[str, object]:
        whole = {"zero_optimization": {"stage": stage, **zero}, "bf16": {"enabled": False}}
        return engines.deepspeed.state_layout(whole, ranks)

    why = engines.why_not_resumable
    assert why(layout(3, 2), layout(3, 2)) is None
    assert why(layout(0, 2), layout(0, 4)) is None  # whole on every rank
    assert "written by PyTorch" in why(engines.TORCH_STATE, layout(3, 2))
    assert "ZeRO stage was 3 and is now 1" in why(layout(3, 2), layout(1, 2))
    assert "sub_group_size was None and is now 9" in why(
        layout(3, 2), layout(3, 2, sub_group_size=9)
    )


# ---------------------------------------------------------------------- wrong use


def test_operator_that_cannot_be_compiled(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    file = config_file(tmp_path, optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    done = train(1, "--data", corpus, "--out", tmp_path / "out", "--deepspeed", file)
    (line,) = done.errors("train.py")
    assert "fused_adam" in line and "ninja and c++ is not on PATH" in line


def test_configuration_that_deepspeed_refuses(corpus: Path, tmp_path: Path) -> None:
    file = config_file(tmp_path, data_types={"keep_in_fp32_modules": 3})
    done = train(1, "--data", corpus, "--out", tmp_path / "out", "--deepspeed", file)
    (line,) = done.errors("train.py")
    assert "DeepSpeed refuses its configuration" in line and "keep_in_fp32_modules" in line
