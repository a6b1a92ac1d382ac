"""Few labels: a student learns them, and to agree with its own average about all other digits.

    pip install 'sharded-ema[examples]'
    torchrun --nproc-per-node 2 examples/mean_teacher.py

Mean teacher (Tarvainen and Valpola, 2017, 1703.01780): 30 of 1,200 images of handwritten digits
have a label. Student and teacher see other views of each image; that they differ is a loss, which
counts more and more in the first third of the run. --consistency 0 learns from labels alone.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, mse_loss

from sharded_ema import ShardedEMA

LABELLED, TRAINED = 30, 1200


def view(images: Tensor, strength: float) -> Tensor:
    """Each turned, stretched and moved a little, with noise."""
    warp = torch.eye(2, 3) + strength * torch.randn(len(images), 2, 3)
    grid = affine_grid(warp, [len(images), 1, 8, 8], align_corners=False)
    seen = grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
    return seen + strength * torch.randn_like(seen)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    return (model(images).argmax(1) == classes).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--consistency", type=float, default=10.0, help="its share of the loss")
    args = parser.parse_args()
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    classes = torch.tensor(digits.target)
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, 128), nn.GELU()]
    student, rank = nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(128, 10)), 0
    if "RANK" in os.environ:  # started by torchrun
        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        fully_shard(student, mesh=mesh)
        rank = dist.get_rank()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    ema = ShardedEMA(student, "warmup:0.99")
    ema.attach(optimizer)
    teacher = ema.module()  # without dropout; its weights are the average

    torch.manual_seed(1 + rank)
    for step in range(args.steps):
        chosen = images[torch.randint(LABELLED, TRAINED, (128,))]
        with torch.no_grad():
            wanted = teacher(view(chosen, 0.03)).softmax(1)
        # One forward for both: what has a label comes first.
        found = student(view(torch.cat([images[:LABELLED], chosen]), 0.15))
        labels = cross_entropy(found[:LABELLED], classes[:LABELLED])
        agreement = mse_loss(found[LABELLED:].softmax(1), wanted)
        (labels + min(1, 3 * step / args.steps) * args.consistency * agreement).backward()
        optimizer.step()
        optimizer.zero_grad()

    student.eval()
    held_out = images[TRAINED:], classes[TRAINED:]
    found = accuracy(student, *held_out), accuracy(teacher, *held_out)
    if rank == 0:
        print(f"held out: student {found[0]:.3f}  teacher {found[1]:.3f}")
    ema.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
