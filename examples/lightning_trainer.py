"""Lightning's Trainer and FSDP2 with an average of the weights: one callback.

    torchrun --nproc-per-node 2 examples/lightning_trainer.py

Validation sees the average. Start it again and it goes on from the last checkpoint.
"""

import argparse

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from sharded_ema.integrations.lightning import EMAWeightAveraging


class Sines(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 1))

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):  # fit() and validate() both call this
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, x: Tensor, index: int) -> Tensor:
        noise = torch.randn(len(x), 1, generator=torch.Generator().manual_seed(self.global_step))
        return nn.functional.mse_loss(self.net(x), x.sin().sum(1, keepdim=True) + noise)

    def validation_step(self, x: Tensor, index: int) -> None:
        loss = nn.functional.mse_loss(self.net(x), x.sin().sum(1, keepdim=True))
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--out", default="runs/lightning")
args = parser.parse_args()
torch.manual_seed(0)
data = torch.randn(4096, 16)
average = EMAWeightAveraging(schedule="warmup:0.98")
keep = ModelCheckpoint(args.out, monitor="epoch", mode="max", save_last="link")
parallel = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
trainer = Trainer(accelerator="cpu", devices=2, strategy=parallel, max_epochs=args.epochs,
                  callbacks=[average, keep], logger=False, num_sanity_val_steps=0)  # fmt: skip
loaders = (torch.utils.data.DataLoader(rows, batch_size=32) for rows in (data[512:], data[:512]))
trainer.fit(Sines(), *loaders, ckpt_path="last")  # the last checkpoint, if there is one
if trainer.is_global_zero:
    print(f"{average.ema.num_updates} updates, loss {trainer.callback_metrics['val_loss']:.4f}")
    print(
        f"export: sharded-ema consolidate {keep.best_model_path}.ema export --rename 's/^net\\.//'"
    )
