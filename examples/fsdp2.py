"""FSDP2 with an average of the weights: train, save, and go on from where a run has stopped.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Runs on GPUs or CPUs, on any number of ranks, also of several machines that share --out. Start it
again and it goes on from the last checkpoint, also on another number of ranks.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from sharded_ema import ShardedEMA, latest_checkpoint
from sharded_ema.errors import CheckpointNotFoundError


def batch(step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank sees at a step: noisy values of a function of 16 numbers."""
    draw = torch.Generator().manual_seed(step * 10_000 + rank)
    x = torch.randn(64, 16, generator=draw)
    y = x.sin().sum(1, keepdim=True) + torch.randn(64, 1, generator=draw)
    return x.to(device), y.to(device)


@torch.no_grad()
def held_out_loss(model: nn.Module, device: torch.device) -> float:
    """On points that no step has; the same on every rank. The noise alone has a loss of 1."""
    batches = [batch(-step, 0, device) for step in range(1, 33)]
    return sum(nn.functional.mse_loss(model(x), y).item() for x, y in batches) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp2"))
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # gloo beside nccl: what the library agrees on, and saves, never touches a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)
    layers = [nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)]
    model = nn.Sequential(*layers).to(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    # The average is saved last, so its last commit is the step that everything is there of.
    try:
        last = latest_checkpoint(args.out / "ema")
    except CheckpointNotFoundError:
        last = None
    if last is not None:
        weights, state = get_state_dict(model, optimizer)
        whole = {"model": weights, "optimizer": state}
        dcp.load(whole, checkpoint_id=args.out / "train" / last.name)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    ema = ShardedEMA(model, "half_life:50", total_steps=args.steps)
    ema.attach(optimizer)  # from here every step moves the average
    start = ema.load(last) if last is not None else 0
    if rank == 0:
        print(f"from step {start}")

    for step in range(start + 1, args.steps + 1):
        x, y = batch(step, rank, device)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % args.save_every == 0 or step == args.steps:
            name = f"step_{step:06d}"
            if rank == 0:  # of a run that died after this save and before the average's
                shutil.rmtree(args.out / "train" / name, ignore_errors=True)
            dist.barrier()
            weights, state = get_state_dict(model, optimizer)
            whole = {"model": weights, "optimizer": state}
            dcp.save(whole, checkpoint_id=args.out / "train" / name)
            ema.save(args.out / "ema" / name, step=step, asynchronous=True)  # goes on beside us

    raw = held_out_loss(model, device)
    with ema.swap():  # all ranks: a forward pass of shards communicates
        average = held_out_loss(model, device)
    if rank == 0:
        print(f"held out: raw {raw:.4f}  average {average:.4f}")
        print(f"export:   sharded-ema consolidate {args.out / 'ema' / 'latest'} export")
    ema.close()  # waits for the last save
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
