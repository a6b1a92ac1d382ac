"""Self-distillation without labels: a student follows its own average, on digits of 8 x 8 pixels.

    pip install 'sharded-ema[examples]'
    torchrun --nproc-per-node 2 examples/dino_digits.py

The teacher of DINO (Caron et al., 2021, 2104.14294) is the average of the student. Both see other
views of an image; the student learns what the teacher says, which is centred and sharpened. How
good the features are is told by the five nearest of a hundred images with labels.
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
from torch.nn.functional import affine_grid, grid_sample, normalize

from sharded_ema import Cosine, ShardedEMA


class Encoder(nn.Module):
    """Features of images of shape (N, 64), and how well they fit each of 128 prototypes."""

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU())
        self.body = nn.Sequential(*first, nn.Linear(256, 256), nn.LayerNorm(256), nn.GELU())
        self.neck = nn.Linear(256, 64)
        self.prototypes = nn.Parameter(normalize(torch.randn(128, 64), dim=1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return features, normalize(self.neck(features), dim=1) @ self.prototypes.T


def view(images: Tensor) -> Tensor:
    """Each turned, stretched and moved a little, with noise."""
    warp = torch.eye(2, 3) + 0.1 * torch.randn(len(images), 2, 3)
    grid = affine_grid(warp, [len(images), 1, 8, 8], align_corners=False)
    seen = grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
    return seen + 0.1 * torch.randn_like(seen)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Of a vote of the five nearest of the first hundred, about all others."""
    features = normalize(model(images)[0], dim=1)
    nearest = (features[100:] @ features[:100].T).topk(5).indices
    return (classes[:100][nearest].mode(1).values == classes[100:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    classes = torch.tensor(digits.target)
    torch.manual_seed(0)
    student, rank = Encoder(), 0
    if "RANK" in os.environ:  # started by torchrun
        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        fully_shard(student, mesh=mesh)
        rank = dist.get_rank()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    ema = ShardedEMA(student, Cosine(0.99, steps=args.steps))
    ema.attach(optimizer)
    teacher = ema.module()  # its weights are the average: nothing to update, nothing held twice
    before, center = accuracy(student, images, classes), torch.zeros(128)

    torch.manual_seed(1 + rank)
    for _ in range(args.steps):
        chosen = images[torch.randint(len(images), (128,))]
        views = torch.cat([view(chosen), view(chosen)])
        with torch.no_grad():
            said = teacher(views)[1]
        wanted = ((said - center) / 0.03).softmax(1).roll(128, 0)  # of the other view
        (-(wanted * (student(views)[1] / 0.1).log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = said.mean(0)
        if dist.is_initialized():
            dist.all_reduce(mean.div_(dist.get_world_size()))
        center.lerp_(mean, 0.1)

    found = accuracy(student, images, classes), accuracy(teacher, images, classes)
    if rank == 0:
        print(f"nearest of 100: untrained {before:.3f}  student {found[0]:.3f}  ", end="")
        print(f"teacher {found[1]:.3f}")
    ema.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
