"""A training loop as timm has it, with our average; started again it goes on.

torchrun --nproc-per-node 2 examples/timm_loop.py --out runs/timm
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.models import load_checkpoint, resume_checkpoint
from timm.utils import CheckpointSaver, distribute_bn

from sharded_ema.integrations.timm import ModelEmaV3  # was: from timm.utils

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--out", type=Path, default=Path("runs/timm"))
args = parser.parse_args()
dist.init_process_group("gloo")
rank, updates = dist.get_rank(), 10
torch.manual_seed(0)
bare = timm.create_model("test_resnet", num_classes=4)
optimizer = torch.optim.SGD(bare.parameters(), lr=0.05, momentum=0.9)
last, epochs_done = args.out / "last.pth.tar", 0
if last.exists():
    epochs_done = resume_checkpoint(bare, str(last), optimizer, log_info=rank == 0)
model_ema = ModelEmaV3(bare, decay=0.95, use_warmup=True)  # before the wrapper, as timm does it
if last.exists():
    load_checkpoint(model_ema.module, str(last), use_ema=True)
model = torch.nn.parallel.DistributedDataParallel(bare)
if rank == 0:
    args.out.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(bare, optimizer, model_ema=model_ema, checkpoint_dir=str(args.out))


def batch(seed):
    torch.manual_seed(seed)
    labels = torch.randint(0, 4, (16,))
    images = torch.randn(16, 3, 32, 32)
    images += labels.view(-1, 1, 1, 1) * torch.linspace(-1, 1, 32)
    return images, labels


for epoch in range(epochs_done, args.epochs):
    for update in range(epoch * updates + 1, (epoch + 1) * updates + 1):
        images, labels = batch(2 * update + rank)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        model_ema.update(model, step=update)
    distribute_bn(model_ema, 2, reduce=True)  # running statistics of the average, over the ranks
    images, labels = batch(-1)
    loss = torch.nn.functional.cross_entropy(model_ema(images), labels).item()
    if rank == 0:
        if epoch % 2:
            saver.save_checkpoint(epoch, metric=-loss)
        print(f"epoch {epoch + 1} of {args.epochs}: average's loss {loss:.9f}", flush=True)
dist.destroy_process_group()
