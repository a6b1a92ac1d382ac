"""Q-learning of a pole on a cart, whose target network is an average of the network that learns.

    torchrun --nproc-per-node 2 examples/target_network.py

Deep Q-learning (Mnih et al., 2015) copies the network into its target every so many steps, DDPG
(Lillicrap et al., 2015, 1509.02971) moves the target by a small rate at each. Here it goes half of
the way every 10 steps: with decay_per="update" the rate counts once, however many steps lie
between. The network chooses the next action, and the target tells what it is worth (double
Q-learning, van Hasselt et al., 2015, 1509.06461).
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import smooth_l1_loss

from sharded_ema import ShardedEMA

LONGEST = 200  # steps of an episode


def step_of(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Poles of half a metre, pushed left or right for 20 ms: where they are, and which have fallen.

    Barto, Sutton and Anderson (1983); a state is position, speed, angle and its speed.
    """
    _, speed, angle, turn = state.unbind(1)
    push = (action * 20.0 - 10.0 + 0.05 * turn.square() * angle.sin()) / 1.1
    bend = 9.8 * angle.sin() - angle.cos() * push
    bend = bend / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
    pull = push - 0.05 * bend * angle.cos() / 1.1
    change = torch.stack([speed, pull, turn, bend], 1)
    after = state + 0.02 * change
    return after, (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > 0.21)


@torch.no_grad()
def returns(model: nn.Module) -> float:
    """Mean number of steps that 64 poles stand if its best action is taken."""
    state = (torch.rand(64, 4, generator=torch.Generator().manual_seed(0)) - 0.5) / 10
    standing, total = torch.ones(64, dtype=torch.bool), 0
    for _ in range(LONGEST):
        state, fallen = step_of(state, model(state).argmax(1))
        standing &= ~fallen
        total += int(standing.sum())
    return total / 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, rank = (
        nn.Sequential(
            nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
        ),
        0,
    )
    if "RANK" in os.environ:  # started by torchrun
        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        fully_shard(model, mesh=mesh)
        rank = dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ema = ShardedEMA(model, 0.5, update_every=10, decay_per="update")
    ema.attach(optimizer)
    target = ema.module()

    torch.manual_seed(1 + rank)
    state, age = (torch.rand(16, 4) - 0.5) / 10, torch.zeros(16)
    memory: list[tuple[Tensor, ...]] = []
    for step in range(args.steps):
        with torch.no_grad():  # 16 poles go on by a step, some at random
            action = model(state).argmax(1)
        greedy = torch.rand(16) > max(0.05, 1 - 2 * step / args.steps)
        action = torch.where(greedy, action, torch.randint(2, (16,)))
        after, fallen = step_of(state, action)
        memory = [*memory[-2000:], (state, action, after, fallen)]
        age = (age + 1) * ~fallen * (age < LONGEST)
        state = torch.where(age[:, None] > 0, after, (torch.rand(16, 4) - 0.5) / 10)

        chosen = [memory[i] for i in torch.randint(len(memory), (8,)).tolist()]
        before, action, after, fallen = (torch.cat(part) for part in zip(*chosen, strict=True))
        with torch.no_grad():
            best = model(after).argmax(1, keepdim=True)
            wanted = 1 + 0.97 * target(after).gather(1, best)[:, 0] * ~fallen
        found = model(before).gather(1, action[:, None])[:, 0]
        smooth_l1_loss(found, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = returns(model), returns(target)
    if rank == 0:
        print(f"steps that it stands: network {found[0]:.1f}  target {found[1]:.1f}  of {LONGEST}")
    ema.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
