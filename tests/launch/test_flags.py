"""Command lines of the training program that are refused, and what others are taken for."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.programs import CONFIGS, config_file, needs_deepspeed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ema-decay", "0.9"], "--ema-decay needs --ema"),
        (["--ema", "--ema-decay", "0.9", "--ema-half-life", "10"], "not allowed with argument"),
        (["--ema", "--ema-decay", "1.5"], "between 0 and 1"),
        (["--ema", "--ema-start-step", "6", "--steps", "6"], "--ema-start-step 6"),
        (["--ema", "--ema-profile", "a=0.9", "--ema-profile", "a=0.5"], "each name once"),
        (["--ema", "--ema-profile", "0.9"], "NAME=SCHEDULE"),
        (["--pure-bf16", "--dtype", "float32"], "--pure-bf16 contradicts"),
        (["--parallel", "fsdp2"], "needs torchrun"),
        (["--resume", "auto"], "--out"),
        (["--model", "somewhere", "--layers", "2"], "--layers does not go with --model"),
        (["--heads", "3", "--kv-heads", "2", "--hidden-size", "12"], "multiple of --kv-heads"),
        (["--batch-size", "1", "--accumulation", "2"], "--batch-size 1"),
    ],
)
def test_contradictory_flags(
    flags: list[str], words: str, usage_error: Callable[[list[str]], str]
) -> None:
    assert words in usage_error(flags)


def test_unknown_schedule(usage_error: Callable[[list[str]], str]) -> None:
    line = usage_error(["--ema", "--ema-profile", "a=bogus:3"])
    assert "unknown schedule 'bogus:3'" in line and "half_life" in line


# ---------------------------------------------------------------------- groups and accelerate


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (2, ["--parallel", "hsdp"], "hsdp needs two groups of two ranks or more, but 2 were"),
        (4, ["--parallel", "hsdp", "--shard-size", "3"], "--shard-size 3 does not divide 4 ranks"),
        (4, ["--parallel", "hsdp", "--shard-size", "4"], "--shard-size 4 does not divide"),
        (4, ["--parallel", "hsdp", "--shard-size", "1"], "--shard-size 1 does not divide"),
        (4, ["--shard-size", "2"], "--shard-size needs --parallel hsdp"),
        (4, ["--parallel", "hsdp", "--tp-size", "2"], "--tp-size needs --parallel tp"),
        (3, ["--parallel", "tp"], "--tp-size 2 does not divide 3 ranks"),
        (2, ["--parallel", "tp", "--tp-size", "1"], "--tp-size 1 does not divide"),
        (4, ["--parallel", "tp", "--batch-size", "1"], "each of 2 groups of 2 ranks"),
        (
            2,
            ["--parallel", "tp", "--compile", "--activation-checkpointing"],
            "PyTorch fails at --compile with",
        ),
        (None, ["--parallel", "accelerate"], "needs torchrun or accelerate launch"),
        (2, ["--parallel", "accelerate", "--pure-bf16"], "--pure-bf16 does not go"),
    ],
)
def test_flags_that_contradict(
    ranks: int | None, flags: list[str], words: str, usage_error: Callable[..., str]
) -> None:
    assert words in usage_error(flags, ranks)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision is 'fp16'"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--dtype float32 contradicts"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "sets ACCELERATE_USE_DEEPSPEED"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "--parallel hsdp or tp"),
    ],
)
def test_configurations_of_accelerate_that_contradict(
    name: str,
    value: str,
    words: str,
    usage_error: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    assert words in usage_error(["--parallel", "accelerate", "--dtype", "float32"], 2)


# ---------------------------------------------------------------------- DeepSpeed


def test_missing_package(usage_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    line = usage_error(["--parallel", "zero3"], ranks=2)
    assert "pip install 'sharded-ema[deepspeed]'" in line


@needs_deepspeed
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
def test_flags_that_contradict_deepspeed(
    flags: list[str | Path], words: str, usage_error: Callable[..., str]
) -> None:
    assert words in usage_error([str(flag) for flag in flags], ranks=2)


def test_zero_without_a_launcher(usage_error: Callable[..., str]) -> None:
    assert "needs torchrun or deepspeed" in usage_error(["--parallel", "zero3"])


@needs_deepspeed
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


def test_sections_that_are_off_or_left_open(tmp_path: Path) -> None:
    from training.engines.deepspeed import complete_config, read_config

    given = read_config(
        config_file(
            tmp_path,
            fp16={"enabled": "auto", "loss_scale": 0},
            torch_autocast={"enabled": False},
            zero_optimization={"stage": 2, "reduce_bucket_size": "auto"},
        )
    )
    flags = {"batch_size": 4, "accumulation": 1, "clip_norm": 1.0, "dtype": "float32"}
    got = complete_config(given, flags, 2)
    assert "fp16" not in got and "torch_autocast" not in got
    assert got["zero_optimization"] == {"stage": 2}


@needs_deepspeed
@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_ready_configuration_is_completed_from_the_flags(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.flags import parse_options

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = parse_options(
        ["--deepspeed", str(file), "--dtype", "bfloat16", "--accumulation", "2", "--clip-norm", "0"]
    )
    assert options.parallel == f"zero{file.stem.removeprefix('zero')[0]}"
    got = options.deepspeed
    assert got["train_batch_size"] == 16 and got["train_micro_batch_size_per_gpu"] == 4
    assert got["gradient_accumulation_steps"] == 2 and got["gradient_clipping"] == 0
    assert got["bf16"] == {"enabled": True}
    assert "auto" not in json.dumps(got)
