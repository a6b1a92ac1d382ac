"""Checkpoints of every format version and kind, kept so that later versions can be tried on them.

``python -m tests.data.make`` writes those that are not there yet, with the code as it is: what is
committed stays. Two ranks write them; values follow a formula.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import SafetensorsStorageWriter, ShardedEMA
from tests.helpers.pool import WorkerPool

FOLDER = Path(__file__).parent
#: By name of the archive.
KINDS = (
    "v1-safetensors", "v1-dcp", "v1-nested-safetensors", "v1-nested-stock",
    # With the identity of the average in it; at a URL, with the uuid in the names of files.
    "v1-run-safetensors", "v1-run-dcp", "v2-safetensors",
)  # fmt: skip
STEP = 2


def formula(shape: tuple[int, ...], number: int) -> Tensor:
    """Values that no rounding touches."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 37 + number * 11) % 101 - 50).float().div(64).view(shape)


class Model(nn.Module):
    """Uneven, 0-d, tied, frozen and integer tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(5, 7)
        self.deep = nn.Parameter(torch.empty(3, 2, 3))
        self.scale = nn.Parameter(torch.empty(()))
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.wide.weight
        self.frozen = nn.Parameter(torch.empty(3), requires_grad=False)
        self.register_buffer("count", torch.tensor(1 << 40))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(formula(tuple(parameter.shape), number))


def expected() -> dict[str, Tensor]:
    """What an export of the average holds, by name."""
    model = Model()
    found = {name: value.detach().clone() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Half of the way to p + 1, then of the rest.
            found[name] += 0.75
    return found | dict(model.named_buffers())


def save(folder: str) -> None:
    """Run on every rank."""
    model = DistributedDataParallel(Model())
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    for _ in range(STEP):
        ema.update()
    root = Path(folder)
    ema.save(root / "v1-safetensors", step=STEP)
    ema.save(root / "v1-dcp", step=STEP, format="dcp")
    ema.save(root / "v1-run-safetensors", step=STEP)
    ema.save(root / "v1-run-dcp", step=STEP, format="dcp")
    ema.save(f"file://{root}/v2-safetensors", step=STEP)
    state = {"model": model.module.state_dict(), "ema": ema}
    writer = SafetensorsStorageWriter(root / "v1-nested-safetensors")
    dcp.save(state, storage_writer=writer)
    dcp.save({**state, "epoch": 3}, checkpoint_id=root / "v1-nested-stock")
    ema.close()


def pack(source: Path, target: Path) -> None:
    """One compressed archive: a description alone takes 256 KiB, nearly all of it zeros."""
    with tarfile.open(target, "w:xz") as archive:
        for file in sorted(source.iterdir()):
            info = tarfile.TarInfo(file.name)
            info.size = file.stat().st_size
            with open(file, "rb") as opened:
                archive.addfile(info, opened)


def unpack(kind: str, target: Path) -> Path:
    """A committed checkpoint, as it was written."""
    with tarfile.open(FOLDER / f"{kind}.tar.xz") as archive:
        archive.extractall(target / kind)  # ours; early Python 3.11 knows no filter
    return target / kind


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    pool = WorkerPool(2)
    pool.run(save, str(folder))
    pool.stop()
    for kind in KINDS:
        if not (FOLDER / f"{kind}.tar.xz").exists():
            pack(folder / kind, FOLDER / f"{kind}.tar.xz")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
