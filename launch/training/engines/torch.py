"""Training by PyTorch alone: however it spreads the model, or in one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from engine import Engine
from language_model import build_optimizer, parameter_groups
from options import Options
from parallel import accumulating, clip_gradients, describe_layout, parallelize
from ranks import Ranks, RunError
from sharded_ema import ShardedEMA


class TorchEngine(Engine):
    """A model wrapped as ``--parallel`` says; its training state is a stock DCP checkpoint."""

    def __init__(self, bare: PreTrainedModel, options: Options, ranks: Ranks) -> None:
        self._options = options
        self._ranks = ranks
        self.layout = describe_layout(options, ranks)
        # FSDP1 keeps the parameters, but their shapes no longer tell which are matrices;
        # fully_shard makes new ones of the same shapes.
        groups = parameter_groups(bare, options)
        self.model = ranks.everywhere(lambda: parallelize(bare, options, ranks))
        if isinstance(self.model, FSDPModule):
            groups = parameter_groups(self.model, options)
        self.optimizer = build_optimizer(groups, options)

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast where nothing else lowers the precision."""
        options = self._options
        sharded = options.parallel not in ("ddp", "none")
        if options.dtype == "bfloat16" and not options.pure_bf16 and not sharded:
            return torch.autocast(self._ranks.device.type, torch.bfloat16)
        return nullcontext()

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return accumulating(self.model, last)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, rate: float) -> torch.Tensor | float | None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self._options.clip_norm:
            norm = clip_gradients(self.model, self._options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def attach(self, ema: ShardedEMA) -> None:
        ema.attach(self.optimizer)

    def gather(self) -> dict[str, torch.Tensor]:
        # On CPUs an offload copies nothing, and FSDP1 then hands out memory that it has freed.
        offload = self._ranks.device.type != "cpu"
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
        state: dict[str, Any] = get_model_state_dict(self.model, options=options)
        if not self._ranks.first:
            return {}
        # DDP hands out the live weights.
        return {name: value.to("cpu", copy=True) for name, value in state.items()}

    def save(self, path: Path, ema: ShardedEMA | None, step: int) -> None:
        """Model and optimizer go to ``path/train``."""
        with _quiet_alone() as alone:
            dcp.save(self._state(), checkpoint_id=path / "train", no_dist=alone)
        if ema is not None:
            ema.save(path / "ema", step=step, latest=False)

    def load(self, path: Path) -> None:
        """On whatever number of ranks.

        Giving a fresh optimizer its state takes a step of no effect, which an average attached
        before would count.
        """
        state = self._state()
        try:
            with _quiet_alone() as alone:
                dcp.load(state, checkpoint_id=path / "train", no_dist=alone)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise RunError(f"{path / 'train'} cannot be loaded: {first!r}") from None
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def _state(self) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _quiet_alone() -> Iterator[bool]:
    """Whether this is a run of one process; DCP warns of that even where it was told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield not dist.is_initialized()
