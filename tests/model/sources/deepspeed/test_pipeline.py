"""A pipeline's stages average their own layers and save them as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_ema import ShardedEMA, consolidate
from tests.helpers.engines import config, deepspeed
from tests.helpers.layouts import rank
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]


class Embedding(nn.Module):
    """The same matrix at both ends of the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def build(stage: int, seed: int) -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    deepspeed.init_distributed()
    torch.manual_seed(seed)
    layers = [
        TiedLayerSpec("emb", Embedding),
        LayerSpec(nn.Linear, 5, 5),
        LayerSpec(nn.BatchNorm1d, 5),
        LayerSpec(nn.Linear, 5, 5),
        TiedLayerSpec("emb", Embedding, forward_fn=lambda m, x: x @ m.weight.t()),
    ]
    model = PipelineModule(
        layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform", base_seed=seed
    )
    trained = list(model.parameters())
    settings = config(stage, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def end(engine: Any) -> None:
    engine.destroy()
    # DeepSpeed keeps the grid for all later engines of the process, which have none.
    deepspeed.utils.groups.mpu = None


def batches(index: int) -> Any:
    generator = torch.Generator().manual_seed(100 * index + rank() % 2)
    while True:
        yield (torch.randn(4, 7, generator=generator), torch.randn(4, 7, generator=generator))


def weights(engine: Any) -> dict[str, Tensor]:
    """In fp32 they are the masters, bit for bit."""
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def train_and_save(stage: int, folder: str) -> dict[str, Tensor]:
    engine = build(stage, 0)
    ema = ShardedEMA(engine, 0.9)
    ema.attach()
    expected = weights(engine)
    for index in range(4):
        engine.train_batch(batches(index))
        for name, weight in weights(engine).items():
            expected[name].lerp_(weight, 1 - 0.9)
    assert ema.num_updates == 4
    before = weights(engine)
    with ema.swap():
        inside = weights(engine)
        engine.eval_batch(batches(9))
    for name, average in expected.items():
        assert torch.equal(inside[name], average)
        assert torch.equal(weights(engine)[name], before[name])
    engine.save_checkpoint(folder, "four")
    ema.close()
    end(engine)
    return expected


def load_again(stage: int, folder: str) -> dict[str, Tensor]:
    engine = build(stage, 1)
    ema = ShardedEMA(engine, 0.9)
    assert ema.load(f"{folder}/four/ema") == 4
    with ema.swap():
        inside = weights(engine)
    ema.close()
    end(engine)
    return inside


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_make_one_model(engine_worlds: Worlds, stage: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected: dict[str, Tensor] = {}
    for own in engine_worlds[4].run(train_and_save, stage, str(tmp_path)):
        for name, average in own.items():
            assert torch.equal(expected.setdefault(name, average), average)
    names = {"tied_modules.emb.weight", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight"}
    assert expected.keys() == names | {"3.bias"}
    consolidate(tmp_path / "four" / "ema", tmp_path / "out", progress=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() - expected.keys() == {
        "2.running_mean",
        "2.running_var",
        "2.num_batches_tracked",
    }
    for name, average in expected.items():
        assert torch.equal(stored[name], average)
    for own in engine_worlds[2].run(load_again, stage, str(tmp_path)):
        for name, average in own.items():
            assert torch.equal(average, expected[name])
