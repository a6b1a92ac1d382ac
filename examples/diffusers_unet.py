"""A training script of diffusers of which one import is another; started again it goes on.

torchrun --nproc-per-node 2 examples/diffusers_unet.py --out runs/unet
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from sharded_ema.integrations.diffusers import EMAModel  # was: from diffusers.training_utils

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--save-every", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("runs/unet"))
args = parser.parse_args()
torch.manual_seed(0)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
sizes = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "block_out_channels": (8,)}
small = {"layers_per_block": 1, "norm_num_groups": 4, "up_block_types": ("UpBlock2D",)}
unet = UNet2DModel(**sizes, **small, down_block_types=("DownBlock2D",))
ema_unet = EMAModel(unet.parameters(), decay=0.95, model_cls=UNet2DModel, model_config=unet.config)


def save_model_hook(models, weights, path):
    if accelerator.is_main_process:
        ema_unet.save_pretrained(f"{path}/unet_ema")


def load_model_hook(models, path):
    ema_unet.load_state_dict(EMAModel.from_pretrained(f"{path}/unet_ema", UNet2DModel).state_dict())


accelerator.register_save_state_pre_hook(save_model_hook)
accelerator.register_load_state_pre_hook(load_model_hook)
model, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=1e-2))
saved = max((int(p.name[11:]) for p in args.out.glob("checkpoint-*")), default=0)
if saved:
    accelerator.load_state(f"{args.out}/checkpoint-{saved}")
for step in range(saved + 1, args.steps + 1):
    torch.manual_seed(1000 * step + accelerator.process_index)
    noise, time = torch.randn(2, 4, 1, 8, 8), torch.randint(0, 1000, (4,))
    found = model(noise.sum(0).to(accelerator.device), time.to(accelerator.device)).sample
    loss = (found - noise[0].to(accelerator.device)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    ema_unet.step(model.parameters())
    if step % args.save_every == 0:
        accelerator.save_state(f"{args.out}/saving")
        accelerator.wait_for_everyone()  # each rank has written its random state
        if accelerator.is_main_process:
            (args.out / "saving").rename(args.out / f"checkpoint-{step}")
    average = ema_unet.shadow_params[0].norm()
    accelerator.print(f"step {step} of {args.steps}: loss {loss:.9f}, average {average:.9f}")
ema_unet.copy_to(model.parameters())
unet.save_pretrained(args.out / "unet", is_main_process=accelerator.is_main_process)
accelerator.end_training()
