"""A diffusers script by accelerate: made before prepare(), stepped with what it returned, saved.

torchrun --nproc-per-node 2 -m tests.integrations.diffusers_run BACKEND FOLDER

BACKEND is one of ddp, fsdp1, fsdp2, zero1, zero2, zero3. The first rank writes FOLDER/found.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DeepSpeedPlugin
from diffusers import UNet2DModel
from torch.distributed.fsdp import FullyShardedDataParallel

from sharded_ema.integrations.diffusers import EMAModel
from tests.integrations.facades import UNET
from tests.integrations.on_cpus import zero


def start(backend: str) -> Accelerator:
    if backend.startswith("fsdp"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(backend[4]), use_orig_params=True, auto_wrap_policy="no_wrap",
            sync_module_states=False, cpu_ram_efficient_loading=False,
        )  # fmt: skip
        return Accelerator(cpu=True, fsdp_plugin=plugin)
    if backend.startswith("zero"):
        sizes = {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 8}
        config = zero(int(backend[4])) | sizes | {"gradient_accumulation_steps": 1}
        del config["gradient_clipping"]
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(cpu=True)
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    return Accelerator(cpu=True)


def make() -> Any:
    torch.manual_seed(0)
    return UNet2DModel(**UNET)


def main() -> None:
    backend, folder = sys.argv[1], Path(sys.argv[2])
    accelerator = start(backend)
    unet = make()
    average = {name: p.detach().clone() for name, p in unet.named_parameters()}
    config = unet.config
    ema = EMAModel(make().parameters(), decay=0.6, model_cls=UNet2DModel, model_config=config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema.to(accelerator.device)

    def gather() -> dict[str, torch.Tensor]:
        """Whole weights, on the main process at least."""
        if not isinstance(model, FullyShardedDataParallel):
            return accelerator.get_state_dict(model) or {}
        # Its full state dict reads freed memory on CPUs (seen in PyTorch 2.13).
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in model.named_parameters()
            }

    def train(steps: range, *followers: EMAModel) -> None:
        for step in steps:
            torch.manual_seed(1000 * step + accelerator.process_index)
            noise, time = torch.randn(2, 4, 1, 8, 8), torch.randint(0, 1000, (4,))
            loss = (model(noise.sum(0), time).sample - noise[0]).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            for each in followers:
                each.step(model.parameters())
            whole = gather()
            for name in average if accelerator.is_main_process else ():
                average[name].lerp_(whole[name].float(), 1.0 - ema.get_decay(step))

    train(range(1, 5), ema)
    ema.save_pretrained(folder / "unet_ema")  # every rank
    accelerator.wait_for_everyone()
    resumed = EMAModel.from_pretrained(folder / "unet_ema", UNet2DModel)
    train(range(5, 8), ema, resumed)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    shown = {name: value.clone() for name, value in gather().items()}
    ema.restore(model.parameters())
    values, again = ema.shadow_params, resumed.shadow_params
    if accelerator.is_main_process:
        saved = dict(UNet2DModel.from_pretrained(folder / "unet_ema").named_parameters())
        found = {
            "average": all(map(torch.equal, values, average.values())),
            "shown": all(torch.equal(shown[name].float(), average[name]) for name in average),
            "resumed": all(map(torch.equal, values, again)),
            "another": all(not torch.equal(saved[name], average[name]) for name in average),
            "model": type(model).__name__,
            "bytes": ema.ema.memory["shadow"] / sum(4 * value.numel() for value in values),
        }
        (folder / "found.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
