"""DeepSpeed ZeRO-3 with an average of the weights: train, save, and go on where a run has stopped.

    deepspeed --num_gpus 2 examples/zero.py
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/zero.py     # without GPUs

The average lies in DeepSpeed's own checkpoints: save_checkpoint takes it along, load_checkpoint
brings it back. Start it again and it goes on from the last one, on the same number of ranks, which
is what DeepSpeed asks; the average itself loads on any number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from sharded_ema import ShardedEMA


def batch(step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank sees at a step: noisy values of a function of 16 numbers."""
    draw = torch.Generator().manual_seed(step * 10_000 + rank)
    x = torch.randn(64, 16, generator=draw)
    y = x.sin().sum(1, keepdim=True) + torch.randn(64, 1, generator=draw)
    return x.to(device), y.to(device)


@torch.no_grad()
def held_out_loss(engine: nn.Module, device: torch.device) -> float:
    """On points that no step has; the same on every rank. The noise alone has a loss of 1."""
    batches = [batch(-step, 0, device) for step in range(1, 33)]
    return sum(nn.functional.mse_loss(engine(x), y).item() for x, y in batches) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3))
    parser.add_argument("--out", type=Path, default=Path("runs/zero"))
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # of the launcher
    args = parser.parse_args()
    # On CPUs DeepSpeed would now compile a communication operator that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    torch.manual_seed(0)
    layers = [nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)]
    model = nn.Sequential(*layers)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),  # PyTorch's: nothing to compile
        config={
            "train_micro_batch_size_per_gpu": 64,
            "zero_optimization": {"stage": args.stage},
        },
    )
    rank, device = dist.get_rank(), engine.device

    ema = ShardedEMA(engine, "half_life:50", total_steps=args.steps)
    ema.attach()  # no optimizer: the engine knows its own; its checkpoints now hold the average
    engine.load_checkpoint(str(args.out))  # the one that `latest` names; None where there is none
    start = engine.global_steps
    if rank == 0:
        print(f"from step {start}")

    for step in range(start + 1, args.steps + 1):
        x, y = batch(step, rank, device)
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
        if step % args.save_every == 0 or step == args.steps:
            engine.save_checkpoint(str(args.out), tag=f"step_{step:06d}")

    raw = held_out_loss(engine, device)
    with ema.swap():  # all ranks, in and out: DeepSpeed gathers on both ways
        average = held_out_loss(engine, device)
    if rank == 0:
        print(f"held out: raw {raw:.4f}  average {average:.4f}")
        last = args.out / f"step_{args.steps:06d}" / "ema"
        print(f"export:   sharded-ema consolidate {last} export")
    ema.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
