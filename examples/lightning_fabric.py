"""Lightning Fabric with an average of the weights: three lines beside setup, save and load.

    torchrun --nproc-per-node 2 examples/lightning_fabric.py

Start it again and it goes on from the last checkpoint. fabric.save() itself would write the pieces
of rank 0 alone, and refuses the average.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning import Fabric
from torch import Tensor, nn

from sharded_ema import ShardedEMA, latest_checkpoint
from sharded_ema.errors import CheckpointNotFoundError


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """What this rank sees at a step: noisy values of a function of 16 numbers."""
    draw = torch.Generator().manual_seed(step * 10_000 + rank)
    x = torch.randn(64, 16, generator=draw)
    return x, x.sin().sum(1, keepdim=True) + torch.randn(64, 1, generator=draw)


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--out", type=Path, default=Path("runs/fabric"))
args = parser.parse_args()
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 1))
model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
state = {"model": model, "optimizer": optimizer, "step": 0}
try:
    last = latest_checkpoint(args.out)
    fabric.load(last.with_suffix(""), state)
except CheckpointNotFoundError:
    last = None
ema = ShardedEMA(model, "warmup:0.98")  # of what setup() returned, and after load()
ema.attach(optimizer)
if last is not None:
    ema.load(last)

for step in range(state["step"] + 1, args.steps + 1):
    x, y = batch(step, fabric.global_rank)
    fabric.backward(nn.functional.mse_loss(model(x), y))
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0:
        fabric.save(args.out / f"step_{step}.ckpt", state | {"step": step})
        ema.save(args.out / f"step_{step}.ckpt.ema", step=step, replace=True)
x, y = batch(0, 0)
with torch.no_grad(), ema.swap():
    fabric.print(f"{ema.num_updates} updates, loss {nn.functional.mse_loss(model(x), y):.4f}")
ema.close()
