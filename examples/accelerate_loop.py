"""accelerate with an average of the weights that goes along in save_state() and load_state().

    torchrun --nproc-per-node 2 examples/accelerate_loop.py

or ``accelerate launch``. Start it again and it goes on, also on another number of ranks.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from sharded_ema import ShardedEMA
from sharded_ema.integrations.accelerate import register


def loss(model: nn.Module, step: int, accelerator: Accelerator, n: int = 32) -> torch.Tensor:
    torch.manual_seed(step * 1000 + accelerator.process_index)
    x = torch.randn(n, 16, device=accelerator.device)
    y = x.sin().sum(1, keepdim=True)
    return nn.functional.mse_loss(model(x), y + torch.randn_like(y))


def main() -> None:
    out = Path((*sys.argv[1:], "runs/accelerate")[0])
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 1))
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    ema = ShardedEMA(model, "half_life:50")  # of what prepare() has returned
    ema.attach(optimizer)
    register(accelerator, ema)

    last = out / "last"  # names what was saved by all ranks
    start = int(last.read_text()) if last.is_file() else 0
    if start:
        accelerator.load_state(out / f"step_{start}")
    accelerator.print(f"from step {start}, {ema.num_updates} updates")

    for step in range(start + 1, 501):
        accelerator.backward(loss(model, step, accelerator))
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            accelerator.save_state(out / f"step_{step}")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                last.write_text(str(step))
    raw = loss(model, 0, accelerator, 4096).item()
    with ema.swap():  # all ranks
        average = loss(model, 0, accelerator, 4096).item()
    accelerator.print(f"{ema.num_updates} updates; loss raw {raw:.4f}  average {average:.4f}")
    ema.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
