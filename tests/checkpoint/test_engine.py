"""An engine's checkpoints hold the average; any layout loads it, and its own tools still work."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.errors import CheckpointError, CheckpointNotFoundError, EMAWarning
from tests.helpers.engines import Model, build
from tests.helpers.layouts import assert_equal, rank
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]
Averages = dict[str, Tensor]

ROUND_ROBIN = {"zero": {"round_robin_gradients": True}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (0, {}),
    "zero1": (1, {}),
    "zero2_round_robin": (2, ROUND_ROBIN),
    "zero3": (3, {}),
}
SCHEDULES = {"fast": 0.5, "slow": 0.99}


def target_of(layout: str) -> Any:
    """A fresh model in a layout, with other weights than the one that was saved."""
    if layout in LAYOUTS:
        stage, changes = LAYOUTS[layout]
        return build(stage, "bf16", seed=1, **changes).engine
    torch.manual_seed(1)
    model = Model()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train_and_save(layout: str, folder: str) -> dict[str, Averages]:
    stage, changes = LAYOUTS[layout]
    run = build(stage, "bf16", **changes)
    ema = ShardedEMA(run.engine, SCHEDULES)
    ema.attach()
    for index in range(5):
        run.step(index)
    run.engine.save_checkpoint(folder, "five")
    answer = {name: averages(ema, name) for name in SCHEDULES}
    ema.close()
    run.engine.destroy()
    return answer


def load_and_gather(layout: str, path: str) -> tuple[int, int, dict[str, Averages]]:
    target = target_of(layout)
    ema = ShardedEMA(target, SCHEDULES)
    step = ema.load(path)
    answer = step, ema.num_updates, {name: averages(ema, name) for name in SCHEDULES}
    ema.close()
    if hasattr(target, "destroy"):
        target.destroy()
    return answer


@pytest.fixture(scope="module")
def saved(
    engine_worlds: Worlds, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Averages]]]:
    """A DeepSpeed checkpoint of every layout on 2 ranks, and the averages that were in memory."""
    found = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp(layout)
        found[layout] = folder, engine_worlds[2].run(train_and_save, layout, str(folder))[0]
    return found


@pytest.mark.parametrize("into", [*LAYOUTS, "fsdp2", "ddp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_loads_into_every_layout_on_more_ranks(
    engine_worlds: Worlds, saved: dict[str, Any], layout: str, into: str
) -> None:
    folder, expected = saved[layout]
    assert (folder / "latest").read_text() == "five"
    path = folder / "five" / "ema"
    for step, updates, loaded in engine_worlds[4].run(load_and_gather, into, str(path)):
        assert (step, updates) == (5, 5)
        for name, average in expected.items():
            assert_equal(loaded[name], average)


def save_fsdp2(folder: str) -> Averages:
    model = target_of("fsdp2")
    ema = ShardedEMA(model, SCHEDULES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for _ in range(3):
        ema.update()
    ema.save(folder, step=3)
    answer = averages(ema, "slow")
    ema.close()
    return answer


def test_fsdp2_loads_into_every_stage(engine_worlds: Worlds, tmp_path: Path) -> None:
    expected = engine_worlds[2].run(save_fsdp2, str(tmp_path / "average"))[0]
    for into in LAYOUTS:
        step, updates, loaded = engine_worlds[4].run(
            load_and_gather, into, str(tmp_path / "average")
        )[0]
        assert (step, updates) == (3, 3)
        assert_equal(loaded["slow"], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_is_a_whole_model(saved: dict[str, Any], layout: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, expected = saved[layout]
    consolidate(folder / "five", tmp_path / "out", profile="slow", progress=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model = Model()
    model.load_state_dict({**stored, "tied.weight": stored["inp.weight"]}, strict=True)
    for name, average in expected["slow"].items():
        assert torch.equal(stored[name], average)
    assert torch.equal(stored["frozen"].float(), torch.arange(5.0))


def resume(stage: int, folder: str) -> None:
    """Three steps, a checkpoint, three more; then again from the checkpoint in a new engine."""
    first = build(stage, "bf16")
    ema = ShardedEMA(first.engine, 0.9, update_every=2)
    ema.attach()
    for index in range(3):
        first.step(index)
    first.engine.save_checkpoint(folder)
    for index in range(3, 6):
        first.step(index)
    masters, average = first.masters(), averages(ema)
    ema.close()
    first.engine.destroy()

    second = build(stage, "bf16", seed=5)
    ema = ShardedEMA(second.engine, 0.9, update_every=2)
    ema.attach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", EMAWarning)
        path, _ = second.engine.load_checkpoint(folder)
    assert path is not None
    assert ema.num_updates == 3
    for index in range(3, 6):
        second.step(index)
    assert_equal(second.masters(), masters)
    assert_equal(averages(ema), average)
    with ema.swap():
        second.evaluate()
    # Saving under the same tag again replaces the average that is there.
    second.engine.save_checkpoint(folder, "global_step3")
    assert ShardedEMA(second.engine, 0.9, update_every=2).load(f"{folder}/global_step3/ema") == 6
    ema.close()
    second.engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_equal(engine_worlds: Worlds, stage: int, tmp_path: Path) -> None:
    engine_worlds[2].run(resume, stage, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step3"


def without_average(folder: str) -> tuple[list[str], list[str], int]:
    """A checkpoint from before the average was switched on."""
    old = build(2, "bf16")
    for index in range(3):
        old.step(index)
    old.engine.save_checkpoint(folder, "old")
    weights = old.masters()
    old.engine.destroy()
    said: list[str] = []
    warned: list[str] = []
    updates = -1
    for strict in (False, True):
        run = build(2, "bf16", seed=3)
        ema = ShardedEMA(run.engine, 0.9)
        ema.attach(strict=strict)
        run.step(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EMAWarning)
            try:
                run.engine.load_checkpoint(folder)
                run.engine.load_checkpoint(folder)
            except CheckpointNotFoundError as error:
                said.append(str(error))
        if not strict:
            warned = [str(w.message) for w in caught if issubclass(w.category, EMAWarning)]
            assert_equal(averages(ema), weights)
            updates = ema.num_updates
        ema.close()
        run.engine.destroy()
    return said, warned, updates


def test_checkpoint_without_average(engine_worlds: Worlds, tmp_path: Path) -> None:
    for said, warned, updates in engine_worlds[2].run(without_average, str(tmp_path)):
        assert len(said) == 1 and "old/ema" in said[0]
        assert len(warned) == 1 and "starts anew from the loaded weights" in warned[0]
        assert updates == 0


def weights_only(folder: str) -> None:
    first = build(3, "bf16")
    ema = ShardedEMA(first.engine, 0.9)
    ema.attach()
    for index in range(3):
        first.step(index)
    first.engine.save_checkpoint(folder)
    ema.close()
    first.engine.destroy()
    second = build(3, "bf16", seed=4)
    ema = ShardedEMA(second.engine, 0.9)
    ema.attach()
    second.engine.load_checkpoint(folder, load_module_only=True)
    assert ema.num_updates == 0
    assert_equal(averages(ema), second.masters())
    assert second.engine.load_checkpoint(folder + "/nothing-here")[0] is None
    ema.close()
    second.engine.destroy()


def test_loading_weights_only_starts_the_average_anew(
    engine_worlds: Worlds, tmp_path: Path
) -> None:
    engine_worlds[2].run(weights_only, str(tmp_path))


def mixed_up(folder: str) -> list[str]:
    run = build(1, "bf16")
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    run.step(0)
    run.engine.save_checkpoint(folder, "a")
    run.step(1)
    run.engine.save_checkpoint(folder, "b")
    torch.distributed.barrier()
    if rank() == 0:
        Path(folder, "b", "ema").rename(Path(folder, "b", "mine"))
        Path(folder, "a", "ema").rename(Path(folder, "b", "ema"))
    torch.distributed.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EMAWarning)
        run.engine.load_checkpoint(folder, "b")
    ema.close()
    run.engine.destroy()
    return [str(w.message) for w in caught if issubclass(w.category, EMAWarning)]


def test_states_of_different_steps_are_told(engine_worlds: Worlds, tmp_path: Path) -> None:
    for (text,) in engine_worlds[2].run(mixed_up, str(tmp_path)):
        assert "saved at step 1 and the engine's state at step 2" in text


def save_that_fails(folder: str) -> str:
    run = build(2, "bf16")
    ema = ShardedEMA(run.engine, 0.9)
    ema.attach()
    run.step(0)
    run.engine.save_checkpoint(folder, "good")
    run.step(1)
    if rank() == 0:
        Path(folder, "bad").mkdir()
        Path(folder, "bad", "ema").write_text("in the way")
    torch.distributed.barrier()
    try:
        run.engine.save_checkpoint(folder, "bad")
    except CheckpointError as error:
        text = str(error)
    assert ema.num_updates == 2
    run.step(2)
    ema.close()
    run.engine.destroy()
    return text


def test_latest_does_not_move_before_the_average_is_written(
    engine_worlds: Worlds, tmp_path: Path
) -> None:
    first, second = engine_worlds[2].run(save_that_fails, str(tmp_path))
    assert first == second and "bad/ema exists and is not a directory" in first
    assert (tmp_path / "latest").read_text() == "good"
    assert [p.name for p in (tmp_path / "bad").iterdir()] == ["ema"]


@pytest.mark.parametrize("layout", ["zero1", "zero2_round_robin", "zero3"])
def test_zero_to_fp32_still_works(saved: dict[str, Any], layout: str, tmp_path: Path) -> None:
    folder, _ = saved[layout]
    command = [sys.executable, "zero_to_fp32.py", ".", str(tmp_path), "--tag", "five"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(tmp_path.iterdir())
