"""register() against accelerate itself; on several ranks as well, by accelerate_run.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from sharded_ema import EMAWarning, ShardedEMA
from sharded_ema.errors import CheckpointWriteError, ConfigError

pytest.importorskip("accelerate", minversion="1.15", reason="pip install accelerate")

import accelerate
from accelerate import checkpointing

from sharded_ema.integrations.accelerate import register
from tests.helpers.layouts import build
from tests.helpers.pool import WorkerPool
from tests.launch.programs import ROOT, execute, needs_deepspeed, torchrun


class Loop:
    """A model under an accelerator, its average, and the same average by hand."""

    def __init__(self, accelerator: Any, seed: int = 0) -> None:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(net, optimizer)
        self.ema = ShardedEMA(self.model, 0.9)
        self.ema.attach(self.optimizer)
        self.average = self.weights()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.accelerator.backward(self.model(torch.randn(4, 8)).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average = [
                a.lerp(w, 1 - 0.9) for a, w in zip(self.average, self.weights(), strict=True)
            ]

    def is_plain(self) -> bool:
        with self.ema.swap():
            return all(map(torch.equal, self.weights(), self.average))


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerator = accelerate.Accelerator(cpu=True)
    yield accelerator
    accelerator.free_memory()


@pytest.mark.shows("accelerate", "one process")
def test_saved_and_loaded(accelerator: Any, tmp_path: Path) -> None:
    loop = Loop(accelerator)
    handle = register(accelerator, loop.ema)
    loop.train()
    kept = loop.average
    accelerator.save_state(str(tmp_path / "a"))
    assert (tmp_path / "a" / "ema" / "manifest.json").is_file()
    loop.train()
    assert loop.is_plain()
    accelerator.load_state(str(tmp_path / "a"))
    loop.average = kept
    assert loop.ema.num_updates == 3 and loop.is_plain()
    loop.train()
    assert loop.is_plain()
    handle.remove()
    handle.remove()
    accelerator.save_state(str(tmp_path / "b"))
    assert not (tmp_path / "b" / "ema").exists()
    register(accelerator, loop.ema)


def test_several_models(accelerator: Any, tmp_path: Path) -> None:
    one, other = Loop(accelerator), Loop(accelerator, seed=1)
    register(accelerator, one.ema)
    with pytest.raises(ConfigError, match=r"'ema' of this Accelerator, where register\(\) saves"):
        register(accelerator, other.ema)
    register(accelerator, other.ema, folder="ema_critic")
    one.train(1)
    accelerator.save_state(str(tmp_path))
    assert {p.parent.name for p in tmp_path.rglob("manifest.json")} == {"ema", "ema_critic"}


def test_a_state_without_an_average_is_said_and_seeds(accelerator: Any, tmp_path: Path) -> None:
    loop = Loop(accelerator)
    loop.train()
    accelerator.save_state(str(tmp_path))
    restored = loop.weights()
    loop.train()
    register(accelerator, loop.ema)
    with pytest.warns(EMAWarning) as seen:
        accelerator.load_state(str(tmp_path))
        loop.average = restored
        loop.train()
    (said,) = [w for w in seen if "has no average" in str(w.message)]
    assert said.filename == __file__
    assert loop.ema.num_updates == 3 and loop.is_plain()


def test_one_process_may_pickle_it(accelerator: Any, tmp_path: Path) -> None:
    loop = Loop(accelerator)
    accelerator.register_for_checkpointing(loop.ema)
    loop.train()
    kept = loop.average
    accelerator.save_state(str(tmp_path))
    loop.train()
    accelerator.load_state(str(tmp_path))
    loop.average = kept
    assert loop.ema.num_updates == 3 and loop.is_plain()


def pickled(folder: str) -> str:
    """What save_state() does with registered objects, on each rank."""
    ema = ShardedEMA(build("ddp").target, 0.9)
    # Whose logger wants an Accelerator, which would take its ranks from the environment.
    with patch.object(checkpointing, "logger"), pytest.raises(CheckpointWriteError) as refused:
        checkpointing.save_custom_state(ema, folder)
    assert ema.state_dict()  # whoever else asks
    ema.close()
    return str(refused.value)


def test_several_ranks_may_not_pickle_it(worlds: dict[int, WorkerPool], tmp_path: Path) -> None:
    for said in worlds[2].run(pickled, str(tmp_path)):
        assert "import register; register(accelerator, ema)" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.dist
@pytest.mark.shows("accelerate", "DDP")
def test_the_example_is_killed_and_goes_on_on_one_rank(tmp_path: Path) -> None:
    example, killer = (
        ROOT / "examples" / "accelerate_loop.py",
        Path(__file__).with_name("killed.py"),
    )
    done = execute(*torchrun(2), killer, "250", example, tmp_path)
    assert done.code != 0 and (tmp_path / "last").read_text() == "200"
    done = execute(example, tmp_path).good()
    assert "from step 200, 200 updates" in done.out
    (losses,) = re.findall(r"500 updates; loss raw (\S+)  average (\S+)", done.out)
    assert float(losses[1]) < float(losses[0])


NAMES = {"ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2"} | {
    f"zero{n}": f"ZeRO-{n}" for n in "123"
}


@pytest.mark.stacks
@needs_deepspeed
@pytest.mark.parametrize(
    "backend",
    [pytest.param(b, id=b, marks=pytest.mark.shows("accelerate", n)) for b, n in NAMES.items()],
)
def test_on_two_ranks(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="whose Llama is the model")
    execute(*torchrun(2), "-m", "tests.integrations.accelerate_run", backend, tmp_path).good()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["saved_is_plain"] and found["loaded_is_plain"] and found["again_is_same"]
    assert found["updates"] == 3 and found["averages"] == ["ema"]
    assert "made before accelerator.prepare()" in found["early"]
    assert "where register() saves already" in found["twice"]
    assert all("seeded with" in w for w in found["warned"])
    assert sum(shadow for shadow, _ in found["shadow"]) == 4 * found["parameters"]
    assert [said for _, said in found["shadow"]] == ["CheckpointWriteError"] * 2
    assert "register(accelerator, ema)" in found["registered"]
    if backend != "ddp":  # where such an average is right, and whole on each rank
        assert "make the ShardedEMA" in found["early attached"]
