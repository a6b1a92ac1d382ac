"""What making an average costs one rank of a large job, and how much it keeps.

``python launch/bench/construct.py``. The rank is this process in PyTorch's fake process group, in
which collectives return without having communicated; the model of 1,000 parameters is really
sharded.
``baseline`` clones the rank's part of every parameter, which no shadow can do without.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from measure import ROOT, Report, Row, medians
from sharded_ema import ShardedEMA

# Rank, and the sizes of its mesh: replicas, shards, tensor-parallel ranks.
LAYOUTS = {
    "FSDP2, rank 1000 of 1024": (1000, (1, 1024, 1)),
    "FSDP2, rank 3 of 64": (3, (1, 64, 1)),
    "HSDP 8 x 8, rank 3 of 64": (3, (8, 8, 1)),
    "TP 8 x DP 8, rank 3 of 64": (3, (1, 8, 8)),
}
NUM_LAYERS = 500  # of two parameters each


def sharded_model(rank: int, shape: tuple[int, int, int]) -> nn.Module:
    """The model on one rank of a job of any size."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(shape))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 1024) for _ in range(NUM_LAYERS)))
    if shape[2] > 1:
        parallelize_module(model, mesh["tp"], {"*": ColwiseParallel()})
    fully_shard(model, mesh=mesh["replicate", "shard"] if shape[0] > 1 else mesh["shard"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in local_tensors(model):
            tensor.zero_()
    return model


def local_tensors(model: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter."""
    return [p._local_tensor.detach() for p in model.parameters() if isinstance(p, DTensor)]


def run(case: str, report: Report, rounds: int) -> None:
    """Time one layout, and say how many bytes of shadow the rank keeps."""
    rank, shape = LAYOUTS[case]
    model = sharded_model(rank, shape)
    local = local_tensors(model)
    clone = "clone of the local tensors"
    construct = f"ShardedEMA(model), {len(local):,} parameters"
    rows = [
        Row(clone, lambda: [tensor.clone() for tensor in local]),
        Row(construct, lambda: ShardedEMA(model, 0.999), clone),
    ]
    report.add(case, rows, medians(rows, rounds))
    ema = ShardedEMA(model, 0.999)
    ideal = 4 * sum(p.numel() for p in model.parameters()) / math.prod(shape)
    print(f"  shadow {ema.memory['shadow']:,} bytes, {ema.memory['shadow'] / ideal:.4f} of ideal")
    ema.close()
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append to the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument(
        "--csv",
        type=Path,
        default=ROOT / "docs" / "benchmarks" / "construct.csv",
        help="table to append to (default: docs/benchmarks/construct.csv)",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = Report("cpu")
    for case in LAYOUTS:
        run(case, report, args.rounds)
    report.append_to(args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
