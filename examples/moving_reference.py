"""A language model learns a new text and keeps near its own average, so that it forgets less.

    torchrun --nproc-per-node 2 examples/moving_reference.py

First a small model of letters learns sentences of one kind, then those of another kind alone: from
the text, and from what the reference says to it (a KL divergence, as in distillation). The
reference is its own average, which moves by a rate once every so many steps, as in TR-DPO
(Gorbatovski et al., 2024, 2404.09656). --kl 0 learns the new text without one.
"""

from __future__ import annotations

import argparse
import os
import random

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, kl_div

from sharded_ema import ShardedEMA

LETTERS, SEEN = " .abcdefghijklmnopqrstuvwxyz", 12
NAMES = ["anna", "ben", "carla", "dora", "emil", "frida"]
KINDS = {
    "old": (NAMES, ["reads", "writes", "draws"], ["books", "letters", "maps"]),
    "new": (NAMES, ["grows", "sells", "eats"], ["pears", "plums", "grapes"]),
}


def batch(kind: str, draw: random.Random, sentences: int = 20) -> tuple[Tensor, Tensor]:
    """All windows of a text of such sentences, and the letter that follows each of them."""
    words = (" ".join(map(draw.choice, KINDS[kind])) for _ in range(sentences))
    text = torch.tensor([LETTERS.index(letter) for letter in ". ".join(words)])
    return text.unfold(0, SEEN, 1)[:-1], text[SEEN:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=250, help="of each of the two texts")
    parser.add_argument("--kl", type=float, default=1.0, help="share of the divergence in the loss")
    args = parser.parse_args()
    torch.manual_seed(0)
    width, rank = 32 * SEEN, 0
    hidden = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
    last = nn.Linear(width, len(LETTERS))
    model = nn.Sequential(nn.Embedding(len(LETTERS), 32), nn.Flatten(), *hidden, last)
    if "RANK" in os.environ:  # started by torchrun
        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        for layer in (hidden[0], hidden[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rank = dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = random.Random(1 + rank)

    for _ in range(args.steps):
        text, following = batch("old", draw)
        cross_entropy(model(text), following).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Made now, so that the reference begins as what has learnt the old text.
    ema = ShardedEMA(model, 0.8, update_every=10, decay_per="update")
    ema.attach(optimizer)
    reference = ema.module()
    for _ in range(args.steps):
        text, following = batch("new", draw)
        said = model(text).log_softmax(1)
        with torch.no_grad():
            wanted = reference(text).log_softmax(1)
        apart = kl_div(said, wanted, log_target=True, reduction="batchmean")
        (cross_entropy(said, following) + args.kl * apart).backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        for kind in KINDS:
            text, following = batch(kind, random.Random(0), sentences=200)
            said, wanted = (each(text).log_softmax(1) for each in (model, reference))
            found = cross_entropy(said, following), cross_entropy(wanted, following)
            apart = kl_div(said, wanted, log_target=True, reduction="batchmean")
            if rank == 0:
                print(f"{kind} text: student {found[0]:.3f}  reference {found[1]:.3f}", end="")
                print(f"  nats per letter, KL {apart:.4f}")
    ema.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
