"""The training program under DeepSpeed: real runs of a tiny model on two CPU ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.launch.programs import (
    AVERAGE,
    LAUNCH,
    TINY,
    TrainingRun,
    assert_same,
    average_of,
    check_export,
    consolidate,
    execute,
    finished,
    train,
)

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: pip install '.[deepspeed]'",
    ),
]

CONFIGS = LAUNCH / "configs"
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


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def config_file(folder: Path, **sections: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **sections}))
    return path


# ---------------------------------------------------------------------- the runs that tests share


@pytest.fixture(scope="module")
def plain(folder: Path, corpus: Path) -> TrainingRun:
    """One process without DeepSpeed: the losses that there should be."""
    return finished(folder, "plain", corpus, None, *AVERAGE)


@pytest.fixture(scope="module")
def zero3(folder: Path, corpus: Path) -> TrainingRun:
    """Started by torchrun, without a configuration file."""
    return finished(folder, "zero3", corpus, 2, *AVERAGE, "--parallel", "zero3")


@pytest.fixture(scope="module")
def launched(folder: Path, corpus: Path) -> TrainingRun:
    """The same by DeepSpeed's launcher, which adds ``--local_rank``, and with a file."""
    out = folder / "launched"
    done = execute(
        *(Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2"),
        *("--master_port", str(free_port()), LAUNCH / "train.py", *TINY, *AVERAGE),
        *("--deepspeed", CONFIGS / "zero3.json", "--data", corpus, "--out", out),
    ).good()
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


def test_zero3_gives_the_losses_of_one_process(zero3: TrainingRun, plain: TrainingRun) -> None:
    assert zero3.losses() == pytest.approx(plain.losses(), rel=0, abs=1e-5)
    assert zero3.rows()[6]["raw_loss"] != zero3.rows()[6]["ema_loss/ema"]
    assert "parallel   zero3, world size 2" in zero3.text
    assert "model      llama, 19,808 parameters" in zero3.text  # of which a rank holds a half


def test_clipping_and_rates_are_those_of_one_process(
    zero3: TrainingRun, plain: TrainingRun
) -> None:
    for step, row in plain.rows().items():
        got = zero3.rows()[step]
        assert got["lr"] == row["lr"]
        # Over 1, so that it was clipped.
        assert got["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert plain.rows()[1]["grad_norm"] > 1


def test_zero3_export_loses_what_training_said(zero3: TrainingRun) -> None:
    for dtype in (None, "bfloat16"):
        done = check_export(consolidate(zero3, dtype), zero3).good()
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
    bf16: TrainingRun, plain: TrainingRun
) -> None:
    got = [row["train_loss"] for row in bf16.rows().values()]
    want = [row["train_loss"] for row in plain.rows().values()]
    # Rounded weights move the losses by a thousandth.
    assert got == pytest.approx(want, abs=0.01) and got != want
    norms = [row["grad_norm"] for row in bf16.rows().values()]
    assert norms == pytest.approx([row["grad_norm"] for row in plain.rows().values()], rel=0.02)
    assert "computing in bfloat16" in bf16.text


def test_bf16_export_loses_what_training_said(bf16: TrainingRun) -> None:
    assert check_export(consolidate(bf16), bf16).good().out.count("they agree") == 2


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


def test_what_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(LAUNCH)
    config = importlib.import_module("deepspeed_config")

    def layout(stage: int, ranks: int, **zero: object) -> dict[str, object]:
        whole = {"zero_optimization": {"stage": stage, **zero}, "bf16": {"enabled": False}}
        return config.state_layout(whole, ranks)

    why = config.why_not_resumable
    assert why(layout(3, 2), layout(3, 2)) is None
    assert why(layout(0, 2), layout(0, 4)) is None  # whole on every rank
    assert "written by PyTorch" in why(config.state_layout(None, 2), layout(3, 2))
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


def test_missing_package(usage_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    line = usage_error(["--parallel", "zero3"], ranks=2)
    assert "pip install 'sharded-ema[deepspeed]'" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel", "zero3", "--pure-bf16"], "--pure-bf16 does not go with DeepSpeed"),
        (["--parallel", "zero3", "--compile"], "--compile does not go with DeepSpeed"),
        (["--parallel", "zero1", "--batch-size", "7"], "multiple of 2 ranks x 1 micro-batches"),
        (["--parallel", "ddp", "--deepspeed", CONFIGS / "zero1.json"], "which says zero1"),
        (["--parallel", "zero2", "--deepspeed", CONFIGS / "zero1.json"], "which says zero1"),
        (["--deepspeed", CONFIGS / "nothing.json"], "nothing.json cannot be read"),
    ],
)
def test_contradictory_flags(
    flags: list[str | Path], words: str, usage_error: Callable[..., str]
) -> None:
    assert words in usage_error([str(flag) for flag in flags], ranks=2)


def test_zero_without_a_launcher(usage_error: Callable[..., str]) -> None:
    assert "needs torchrun or deepspeed" in usage_error(["--parallel", "zero3"])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32 .* --batch-size 16"),
        ({"train_micro_batch_size_per_gpu": 2}, "per_gpu is 2 .* --batch-size 16 on 2 ranks"),
        ({"gradient_accumulation_steps": 2}, "steps is 2 .* --accumulation 1"),
        ({"gradient_clipping": 0.5}, "clipping is 0.5 .* --clip-norm 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true .* --dtype float32"),
        ({"fp16": {"enabled": True}}, "'fp16'"),
        ({"torch_autocast": {"enabled": True}}, "'torch_autocast'"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler': --lr"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "params.lr is 1 .* --lr 0.008"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is false"),
        ({"bf16": True}, "bf16 must be an object"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param is to NVMe",
        ),
    ],
)
def test_configuration_against_the_flags(
    sections: dict[str, object], words: str, tmp_path: Path, usage_error: Callable[..., str]
) -> None:
    line = usage_error(["--deepspeed", str(config_file(tmp_path, **sections))], ranks=2)
    assert re.search(words, line)


def test_sections_that_are_off_or_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(LAUNCH)
    config = importlib.import_module("deepspeed_config")
    given = config.read_config(
        config_file(
            tmp_path,
            fp16={"enabled": "auto", "loss_scale": 0},
            torch_autocast={"enabled": False},
            zero_optimization={"stage": 2, "reduce_bucket_size": "auto"},
        )
    )
    flags = {"batch_size": 4, "accumulation": 1, "clip_norm": 1.0, "dtype": "float32"}
    got = config.complete(given, flags, 2)
    assert "fp16" not in got and "torch_autocast" not in got
    assert got["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_ready_configuration_is_completed_from_the_flags(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(LAUNCH)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = importlib.import_module("options").parse_options(
        ["--deepspeed", str(file), "--dtype", "bfloat16", "--accumulation", "2", "--clip-norm", "0"]
    )
    assert options.parallel == f"zero{file.stem.removeprefix('zero')[0]}"
    got = options.deepspeed
    assert got["train_batch_size"] == 16 and got["train_micro_batch_size_per_gpu"] == 4
    assert got["gradient_accumulation_steps"] == 2 and got["gradient_clipping"] == 0
    assert got["bf16"] == {"enabled": True}
    assert "auto" not in json.dumps(got)
