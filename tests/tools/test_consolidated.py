"""The consolidated file is the average. And the proof of it fails for the raw weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sharded_ema import consolidate
from sharded_ema.checkpoint import snapshot
from sharded_ema.model.followed import FollowedModel
from tests.checkpoint.test_store import consolidated_run
from tests.helpers.layouts import Ragged, assert_equal
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, metadata


def prove(folder: Path, average: dict[str, Tensor], raw: dict[str, Tensor]) -> None:
    """What a consolidated directory must be."""
    tensors, metadata = read(folder)
    assert_equal(tensors, average)
    assert any(not torch.equal(tensors[name], value) for name, value in raw.items())
    assert metadata["kind"] == "ema" and metadata["num_updates"] == "5"


@pytest.mark.parametrize("mode", ["fsdp2", "ddp", "hsdp", "tp_fsdp2", "fsdp1"])
def test_consolidated_file_is_the_average(worlds: Worlds, mode: str, tmp_path: Path) -> None:
    average, raw = worlds[4].run(consolidated_run, mode, str(tmp_path / "ema"))[0]
    report = consolidate(tmp_path / "ema", tmp_path / "out", tied="drop", progress=False)
    assert report.ok
    prove(tmp_path / "out", average, raw)
    consolidate(tmp_path / "ema", tmp_path / "all", max_shard_size="500", progress=False)
    tensors, _ = read(tmp_path / "all")
    model = Ragged()
    assert list(model.state_dict()) and model.load_state_dict(tensors, strict=True)


def write_raw(mode: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The classic mistake: the live weights end up under the average's name."""
    right = snapshot.make_averages

    def wrong(model: FollowedModel, average: object) -> dict[str, Tensor]:
        reader = model.reader
        values = reader.stored([t.detach().clone() for t in reader.live()])
        names = [shard.name.fqn for shard in reader.shards]
        return {f"ema.{name}": value for name, value in zip(names, values, strict=True)}

    snapshot.make_averages = wrong  # type: ignore[assignment]
    try:
        # The expectation is taken from the shadow before, by another way.
        return consolidated_run_of_shadow(mode, path, right)
    finally:
        snapshot.make_averages = right


def consolidated_run_of_shadow(mode: str, path: str, right: object) -> tuple[dict, dict]:
    from sharded_ema import ShardedEMA
    from tests.helpers.layouts import as_float, build, reference_step

    run = build(mode)
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    average = as_float(run.gather())
    for index in range(5):
        run.step(index)
        reference_step(average, run.gather(), 1 - 0.9)
    ema.save(path, step=5)
    raw = run.gather()
    ema.close()
    for name, tensor in {**run.gather(frozen=True), **dict(run.bare.named_buffers())}.items():
        if name not in average and name != "scratch":
            average[name] = tensor.clone()
    return average, raw


def test_raw_weights_by_mistake_would_be_found(worlds: Worlds, tmp_path: Path) -> None:
    average, raw = worlds[2].run(write_raw, "fsdp2", str(tmp_path / "ema"))[0]
    assert consolidate(tmp_path / "ema", tmp_path / "out", tied="drop", progress=False).ok
    with pytest.raises(AssertionError):
        prove(tmp_path / "out", average, raw)
