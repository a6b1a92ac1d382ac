"""What the tests of the facades share: layouts in training, and plain loops beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import layouts
from tests.helpers.layouts import Ragged, as_float
from tests.launch.programs import ROOT, execute, torchrun

KILLED = Path(__file__).with_name("killed.py")
ON_CPUS = {"DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}

#: The smallest UNet that diffusers makes.
UNET: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "sample_size": 8,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
BACKENDS = {
    "ddp": "DDP",
    "fsdp1": "FSDP1",
    "fsdp1_flat": "FSDP1",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}


def shown(integration: str, *modes: str) -> list[Any]:
    """Layouts on two ranks, by the names of the tests' tables, as parameters of a test."""
    return [
        pytest.param(mode, id=mode, marks=pytest.mark.shows(integration, BACKENDS[mode]))
        for mode in modes
    ]


def file_of_timm() -> Any:
    """timm's ``ModelEmaV3``, of its file: timm as a whole wants a torchvision that fits."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed: pip install timm")
    file = Path(found.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


def killed_and_resumed(
    example: str, out: Path, *flags: str, at_step: int
) -> tuple[list[str], list[str]]:
    """Run an example on two ranks, which die in a step, and start it again.

    Returns:
        The lines of both, until the kill and to the end.
    """
    program = (ROOT / "examples" / example, *flags, "--out", out)
    dead = execute(*torchrun(2), KILLED, str(at_step), *program, add=ON_CPUS)
    assert "(SIGKILL)" in dead.err, dead.err  # of that, and not of something earlier
    alive = execute(*torchrun(2), *program, add=ON_CPUS).good()
    return dead.out.splitlines(), alive.out.splitlines()


class Training:
    """A ragged model that trains in a layout, whichever framework has made it."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        if mode.startswith("zero"):
            from tests.helpers import engines

            self.engine: Any = engines.build(int(mode[4]), "bf16")
            self.model: nn.Module = self.engine.engine
            torch.manual_seed(0)
            self.bare: nn.Module = engines.Model()  # never wrapped
        else:
            self.run = layouts.build(mode)
            self.model = self.run.target
            torch.manual_seed(0)
            self.bare = Ragged()

    def step(self, index: int) -> None:
        self.engine.step(index) if self.mode.startswith("zero") else self.run.step(index)

    def trained(self) -> dict[str, Tensor]:
        """What is averaged, whole: under DeepSpeed the masters."""
        return as_float(
            self.engine.masters() if self.mode.startswith("zero") else self.run.gather()
        )

    def weights(self) -> dict[str, Tensor]:
        """What a forward uses, whole."""
        if not self.mode.startswith("zero"):
            return self.run.gather()
        trained = self.trained()
        return {n: w for n, w in self.engine.weights().items() if n in trained}

    def end(self) -> None:
        if self.mode.startswith("zero"):
            self.engine.engine.destroy()


def assert_list(values: Sequence[Tensor], average: dict[str, Tensor], names: Sequence[str]) -> None:
    """A list of whole tensors is an average, bit for bit, and what is frozen in its place."""
    assert len(values) == len(names)
    for name, value in zip(names, values, strict=True):
        if name in average:
            assert torch.equal(value.float(), average[name]), name
