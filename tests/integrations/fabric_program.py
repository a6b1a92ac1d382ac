"""fabric.save() of an average under a strategy of Fabric: torchrun's program, on two ranks.

python -m torch.distributed.run --nproc-per-node 2 fabric_program.py STRATEGY FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from sharded_ema import ShardedEMA
from sharded_ema.errors import CheckpointWriteError


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    strategy = kind
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(
            lambda net, mesh: fully_shard(net, mesh=mesh["data_parallel"]),
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    model = fabric.setup(nn.Linear(4, 4))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    ema = ShardedEMA(model, 0.5)
    ema.attach(optimizer)
    fabric.backward(model(torch.ones(2, 4)).square().mean())
    optimizer.step()
    try:
        fabric.save(folder / "x.ckpt", {"model": model, "ema": ema})
        said = "nothing"
    except CheckpointWriteError as error:
        said = str(error)
    every = [""] * 2
    dist.all_gather_object(every, said)
    fabric.save(folder / "y.ckpt", {"model": model})
    ema.save(folder / "y.ckpt.ema", step=1)
    with ema.swap():
        before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert ema.load(folder / "y.ckpt.ema") == 1
    with ema.swap():
        same = all(map(torch.equal, before, (p.detach() for p in model.parameters())))
    if fabric.is_global_zero:
        print("same", same, "|", *every, "|", sorted(path.name for path in folder.iterdir()))
    ema.close()


if __name__ == "__main__":
    main()
