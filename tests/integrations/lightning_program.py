"""Six steps under one of Lightning's strategies, and again from the third: torchrun's program.

python -m torch.distributed.run --nproc-per-node 2 lightning_program.py STRATEGY FOLDER

Rank 0 writes FOLDER/found.json. What CPUs need and users do not is marked "bench".
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sharded_ema.integrations.lightning import EMAWeightAveraging

DECAY = 0.75


class Lit(lightning.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 1))

    def configure_model(self) -> None:
        if self.kind == "fsdp2":
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("val_loss", self.training_step(x, index), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def whole(self) -> list[Tensor]:
        """All parameters as they are now, on every rank."""
        if self.kind == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(self.trainer.model, writeback=False):
                return [p.detach().clone() for p in self.parameters()]
        if self.kind.startswith("zero"):
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.parameters())):
                return [p.detach().clone() for p in self.parameters()]
        if self.kind == "fsdp2":
            return [p.detach().full_tensor().clone() for p in self.parameters()]
        return [p.detach().clone() for p in self.parameters()]


class Watch(lightning.Callback):
    """A plain loop over the weights of every step, and what a validation saw."""

    def __init__(self) -> None:
        self.average: list[Tensor] = []
        self.equal: list[bool] = []
        self.back: list[bool] = []
        self.raw: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, lit: Lit, *_: Any) -> None:
        self.raw = lit.whole()
        for average, now in zip(self.average, self.raw, strict=bool(self.average)):
            average.lerp_(now, 1 - DECAY)
        self.average = self.average or [p.clone() for p in self.raw]

    def on_validation_batch_end(self, trainer: Any, lit: Lit, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.equal.append(all(map(torch.equal, lit.whole(), self.average)))

    def on_validation_end(self, trainer: Any, lit: Lit) -> None:
        if not trainer.sanity_checking:
            self.back.append(all(map(torch.equal, lit.whole(), self.raw)))


class CpuDeepSpeed(DeepSpeedStrategy):
    """Bench: Lightning refuses DeepSpeed on CPUs, and DeepSpeed would compile an operator."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        import deepspeed
        import lightning.pytorch.strategies.deepspeed as theirs

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        theirs._validate_device_index_selection = lambda devices: None
        theirs.argparse.Namespace = lambda **settings: types.SimpleNamespace(
            **settings | {"device_rank": 0}
        )
        super().setup_distributed()


def strategy(kind: str) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if kind.startswith("zero"):
        return CpuDeepSpeed(stage=int(kind[-1]))
    import torch.distributed.fsdp as fsdp

    init = fsdp.FullyShardedDataParallel.__init__

    def on_cpu(self: Any, *args: Any, device_id: Any = None, **more: Any) -> None:  # bench
        init(self, *args, device_id=torch.device("cpu"), **more)

    fsdp.FullyShardedDataParallel.__init__ = on_cpu  # type: ignore[method-assign]
    on_cpus = type("OnCpus", (FSDPStrategy,), {})  # bench: the class itself is refused
    return on_cpus(
        state_dict_type="sharded", auto_wrap_policy={nn.Linear}, process_group_backend="gloo"
    )


def rows() -> torch.utils.data.DataLoader:
    """One step an epoch on two ranks."""
    data = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(data, batch_size=8, shuffle=False)


def fit(kind: str, folder: Path, resume: Path | None = None) -> tuple[Any, Watch, Lit, Any]:
    ours = EMAWeightAveraging(decay=DECAY)
    watch, lit = Watch(), Lit(kind)
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=4, monitor="step", mode="max")
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy(kind), max_epochs=6, logger=False,
        num_sanity_val_steps=1, callbacks=[ours, watch, keep], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    load = torch.utils.data.DataLoader
    trainer.fit(
        lit, load(rows, batch_size=8, shuffle=False), load(rows, batch_size=8), ckpt_path=resume
    )
    return ours, watch, lit, trainer


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    ours, watch, lit, trainer = fit(kind, folder / "whole")
    loss = trainer.callback_metrics["val_loss"].item()
    last = sorted(p.name for p in (folder / "whole").iterdir())
    found = {
        "validations saw the average": watch.equal,
        "weights were back": watch.back,
        "the model holds the average": all(map(torch.equal, lit.whole(), watch.average)),
        "files": last,
        "inside": sorted(p.name for p in (folder / "whole" / last[0]).rglob("ema")),
    }
    ours.ema.close()
    again, _, same, trainer = fit(kind, folder / "again", folder / "whole" / "step=3.ckpt")
    found["updates"] = again.ema.num_updates
    found["resumed loss equal"] = loss == trainer.callback_metrics["val_loss"].item()
    found["resumed weights equal"] = all(map(torch.equal, same.whole(), lit.whole()))
    again.ema.close()
    found["taken out of the file"] = False
    if kind == "ddp":  # which holds the average as Lightning's own does
        path = folder / "whole" / "step=3.ckpt"
        if trainer.is_global_zero:
            path.with_name(f"{path.name}.ema").rename(folder / "away")
        trainer.strategy.barrier()
        again, _, same, trainer = fit(kind, folder / "third", path)
        weights = zip(same.whole(), lit.whole(), strict=True)
        found["taken out of the file"] = all(torch.equal(*pair) for pair in weights)
        again.ema.close()
    found["evaluated outside of fit()"] = False
    if kind.startswith("fsdp"):
        test = lightning.Trainer(
            accelerator="cpu", devices=2, strategy=strategy(kind), logger=False,
            callbacks=[EMAWeightAveraging(decay=DECAY)], enable_progress_bar=False,
        )  # fmt: skip
        path = folder / "whole" / "step=6.ckpt"
        (told,) = test.validate(Lit(kind), rows(), ckpt_path=path)
        found["evaluated outside of fit()"] = told["val_loss"] == loss
    if trainer.is_global_zero:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
