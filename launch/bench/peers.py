"""The other libraries that keep an average: what they hold of a sharded model, and what they cost.

``python launch/bench/peers.py`` makes the measured columns of docs/comparison.md. It needs
torch_ema, ema-pytorch, diffusers and timm; those that are missing are left out. Two ranks of a
model under FSDP2 on the CPU say how many bytes of the average each holds, or how the library ends
there; one process says whether the weights come back from an evaluation that failed, and how long
an update takes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from measure import ROOT, Report, Row, append_rows, machine, medians
from sharded_ema import ShardedEMA

DECAY = 0.999
RANKS = 2
COLUMNS = ("date", "git sha", "torch", "library", "FSDP2, of each rank", "restores after an error")


@dataclass(frozen=True)
class Peer:
    """An average of one library.

    Attributes:
        update: takes the weights in.
        tensors: the average.
        swap: a block in which the average stands in for the weights; of a library that has none,
            what it has instead.
    """

    update: Callable[[], object]
    tensors: Callable[[], Sequence[Tensor]]
    swap: Callable[[], Any] | str = "no swap: a second model"


def ours(model: nn.Module) -> Peer:
    ema = ShardedEMA(model, DECAY)
    return Peer(ema.update, lambda: list(ema.state_dict().values())[:-1], ema.swap)


def averaged_model(model: nn.Module) -> Peer:
    peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Peer(lambda: peer.update_parameters(model), lambda: list(peer.parameters()))


def lightning(model: nn.Module) -> Peer:
    """What EMAWeightAveraging of lightning 2.6 makes in its ``setup``."""
    peer = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY), use_buffers=True)
    return Peer(lambda: peer.update_parameters(model), lambda: list(peer.parameters()))


def timm(model: nn.Module) -> Peer:
    # Its package imports torchvision, which this one module does without.
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("timm")
    path = Path(package.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("model_ema", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peer = module.ModelEmaV3(model, decay=DECAY)
    return Peer(lambda: peer.update(model), lambda: list(peer.parameters()))


def diffusers(model: nn.Module) -> Peer:
    from diffusers.training_utils import EMAModel

    peer = EMAModel(model.parameters(), decay=DECAY)
    return Peer(
        lambda: peer.step(model.parameters()),
        lambda: peer.shadow_params,
        "no block: store(), copy_to() and restore() by hand",
    )


def torch_ema(model: nn.Module) -> Peer:
    from torch_ema import ExponentialMovingAverage

    peer = ExponentialMovingAverage(model.parameters(), decay=DECAY)
    return Peer(peer.update, lambda: peer.shadow_params, peer.average_parameters)


def ema_pytorch(model: nn.Module) -> Peer:
    from ema_pytorch import EMA

    peer = EMA(model, beta=DECAY, update_every=1, update_after_step=0)
    return Peer(peer.update, lambda: list(peer.ema_model.parameters()))


PEERS = {
    "sharded-ema": ours,
    "torch AveragedModel": averaged_model,
    "timm ModelEmaV3": timm,
    "diffusers EMAModel": diffusers,
    "torch_ema": torch_ema,
    "ema-pytorch EMA": ema_pytorch,
    "lightning EMAWeightAveraging": lightning,
}


def network() -> nn.Sequential:
    """A small network: 1,050,624 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))


def under_fsdp2(rank: int, name: str, folder: str) -> None:
    """On one rank: bytes of the average, or what became of the attempt."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    model = network()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    try:
        peer = PEERS[name](model)
        peer.update()
        held = [t.to_local() if isinstance(t, DTensor) else t for t in peer.tensors()]
        result = f"{sum(t.numel() * t.element_size() for t in held):,} bytes"
    except (Exception, SystemExit) as error:  # whatever another library does here is the result
        result = f"{type(error).__name__}: {error}".splitlines()[0]
    Path(folder, str(rank)).write_text(result)
    dist.barrier()
    dist.destroy_process_group()


def restores(name: str) -> str:
    """Whether the weights are back after an evaluation under the average raised."""
    model = network()
    peer = PEERS[name](model)
    if isinstance(peer.swap, str):
        return peer.swap
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    peer.update()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        with peer.swap():
            assert not all(map(torch.equal, before, model.parameters())), "nothing stands in"
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return "exactly" if same else "no"


def update_rows(names: Sequence[str]) -> list[Row]:
    """An update of 1,000 tensors, 21 M elements, as a training loop calls it."""
    sizes = (131072, 32768, 32768, 8192, 4096, 512, 128, 128, 64, 64) * 100
    model = nn.Module()
    model.weights = nn.ParameterList([nn.Parameter(torch.randn(n)) for n in sizes])
    live = [parameter.detach() for parameter in model.parameters()]
    shadow = [t.clone() for t in live]
    bare = "torch._foreach_lerp_"
    rows = [Row(bare, lambda: torch._foreach_lerp_(shadow, live, 1 - DECAY))]
    return rows + [Row(name, PEERS[name](model).update, bare) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append to the tables of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names, lines = [], []
    for name in PEERS:
        try:
            restored = restores(name)
        except ImportError as error:
            print(f"{name}: not installed ({error})")
            continue
        names.append(name)
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(under_fsdp2, (name, folder), nprocs=RANKS)
            of_each = " | ".join(Path(folder, str(rank)).read_text() for rank in range(RANKS))
        print(f"{name}: under FSDP2 {of_each}; weights after an error: {restored}")
        described = {k: v for k, v in machine().items() if k in COLUMNS}
        lines.append(
            {**described, **dict(zip(COLUMNS[3:], (name, of_each, restored), strict=True))}
        )
    append_rows(ROOT / "docs" / "benchmarks" / "peers.csv", COLUMNS, lines)
    report = Report("cpu")
    rows = update_rows(names)
    report.add("mixed: 1,000 tensors, 21 M elements", rows, medians(rows, args.rounds))
    report.append_to(ROOT / "docs" / "benchmarks" / "peers-update.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
