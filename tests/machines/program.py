"""What is trained on the machines: FSDP2, an average, a save every five steps, and going on.

``SHARED/train/step_N`` has model and optimizer, ``SHARED/ema/step_N`` the average, which is saved
last: the steps that count are those that the average was committed of.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from sharded_ema import ShardedEMA, latest_checkpoint
from sharded_ema.errors import CheckpointNotFoundError

DECAY = 0.9
STEPS, EVERY, KEEP = 30, 5, 3


def once(mark: Path) -> bool:
    """Whether this is the first life that comes here."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def stand_still(name: str, mark: Path) -> None:
    """Stop the thread that saves ``name`` when it is about to write this rank's tensors."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        saves = event == "open" and f"{name}.tmp-" in str(args[0]) and "shard-" in str(args[0])
        if saves and once(mark):
            threading.Event().wait()

    sys.addaudithook(hook)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=Path)
    parser.add_argument("notes", type=Path)
    parser.add_argument("--compare", action="store_true", help="also keep a plain average")
    parser.add_argument("--stand-still", type=int, help="machine whose first save of step 15 does")
    parser.add_argument("--terminate", type=int, help="machine whose worker is, after step 17")
    args = parser.parse_args()
    machine = int(os.environ["MACHINE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if machine == args.stand_still:
        stand_still("step_000015", args.notes / "standing")

    torch.manual_seed(0)
    # Sizes that two ranks do not divide evenly.
    model = nn.Sequential(nn.Linear(17, 65), nn.Tanh(), nn.Linear(65, 5))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    try:
        last = latest_checkpoint(args.shared / "ema")
    except CheckpointNotFoundError:
        last = None
    if last is not None:
        weights, state = get_state_dict(model, optimizer)
        dcp.load(
            {"model": weights, "optimizer": state},
            checkpoint_id=args.shared / "train" / last.name,
        )
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    ema = ShardedEMA(model, DECAY, timeout=60)
    ema.attach(optimizer)
    start = ema.load(last) if last is not None else 0
    with (args.notes / f"begun{machine}").open("a") as stream:
        stream.write(f"{start}\n")
    if rank == 0 and (args.shared / "train").is_dir():
        for path in (args.shared / "train").iterdir():
            if int(path.name.removeprefix("step_")) > start:  # its average was never committed
                shutil.rmtree(path)
    dist.barrier()
    plain = whole(model)

    for step in range(start + 1, STEPS + 1):
        draw = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(8, 17, generator=draw)
        (model(x) - x[:, :5].cumsum(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.compare:
            for name, value in whole(model).items():
                plain[name].lerp_(value, 1 - DECAY)
        if step % EVERY == 0:
            name = f"step_{step:06d}"
            weights, state = get_state_dict(model, optimizer)
            dcp.save(
                {"model": weights, "optimizer": state}, checkpoint_id=args.shared / "train" / name
            )
            ema.save(args.shared / "ema" / name, step=step, asynchronous=True, keep_last=KEEP)
        if step == 17 and machine == args.terminate and once(args.notes / "terminated"):
            os.kill(os.getpid(), signal.SIGTERM)

    weights = whole(model)
    ema.close()
    if rank == 0:
        save_file(weights, args.notes / "weights.safetensors")
        if args.compare:
            save_file(plain, args.notes / "plain.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
