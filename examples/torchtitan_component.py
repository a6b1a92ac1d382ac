"""torchtitan's optimizers and checkpoints with an average of the weights, on CPUs.

    torchrun --nproc-per-node 2 examples/torchtitan_component.py

Its Trainer wants a GPU, and builds the same parts of the same configuration: there only
`checkpoint=` changes. Start it again and it goes on from the last checkpoint.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer import ParamGroupConfig as Group

from sharded_ema.integrations.torchtitan import EMA, EMACheckpointManager


def loss_of(step: int) -> Tensor:
    torch.manual_seed(step * 10_000 + dist.get_rank())
    x = torch.randn(64, 16)
    return (net(x) - x.sin().sum(1, keepdim=True)).square().mean()


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--out", default="runs/torchtitan")
args = parser.parse_args()
dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 1))
fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
group = Group(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2})
config = OptimizersContainer.Config(param_groups=[group], implementation="foreach")
parts = {"model_parts": [net], "optimizers": config.build(model_parts=[net])}
rates = LRSchedulersContainer.Config(warmup_steps=0)
parts["lr_schedulers"] = rates.build(optimizers=parts["optimizers"], training_steps=args.steps)
parts |= {"states": {}, "dataloader": None, "sd_adapter": None}
average = EMA.Config(schedule="warmup:0.98")
checkpoint = EMACheckpointManager.Config(enable=True, interval=100, ema=average)
checkpoint.last_save_model_only = False  # so that a run of more steps can go on from this one
checkpointer = checkpoint.build(**parts, base_folder=args.out)
checkpointer.load()
ema = checkpointer.ema.average
for step in range(ema.num_updates + 1, args.steps + 1):
    loss_of(step).backward()
    parts["optimizers"].step()
    parts["optimizers"].zero_grad()
    checkpointer.save(step, last_step=step == args.steps)
with torch.no_grad(), ema.swap():
    loss = loss_of(0)
if dist.get_rank() == 0:
    print(f"{ema.num_updates} updates, loss {loss:.6f}")
checkpointer.close()
dist.destroy_process_group()
