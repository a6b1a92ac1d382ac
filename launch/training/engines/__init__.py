"""What trains the model: the parts of a step and of a checkpoint that frameworks do differently.

A framework is one file here: how its configuration goes with the flags, its engine, and what its
training state asks of the run that loads it. What is optional is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from sharded_ema import ShardedEMA
from training.engines import deepspeed
from training.engines.accelerate import AccelerateEngine
from training.engines.deepspeed import DeepSpeedEngine
from training.engines.torch import TorchEngine
from training.options import Options
from training.ranks import Ranks

# PyTorch's training state loads on any number of ranks, and whatever way it spreads the model.
TORCH_STATE = {"written by": "PyTorch"}


class Engine(Protocol):
    """A model in training, with its optimizer.

    Attributes:
        model: forward passes go through it, and the average is made of it.
        layout: how the model is spread over the ranks, for the user to read.
        saves_average: whether ``save`` takes the attached average along, to ``path/ema``.
    """

    model: nn.Module
    layout: str
    saves_average: bool

    def precision(self) -> AbstractContextManager[Any]:
        """Context of every forward pass."""

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Context of forward and backward pass of one micro-batch; ``last`` of its step or not."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``: a sum over the micro-batches, a mean over the parts."""

    def step(self, rate: float) -> Tensor | float | None:
        """Clip and apply the gradients; their norm, where it is known."""

    def attach(self, ema: ShardedEMA) -> None:
        """Let every step from now on move the average."""

    def gather(self) -> dict[str, Tensor]:
        """The whole model's state by name, in memory of the first rank; on others nothing.

        All ranks take part.
        """

    def save(self, path: Path) -> Callable[[], None]:
        """Write the training state, as it is now, into the directory ``path``.

        Returns:
            What waits until it is written, and raises RunError where it was not.
        """

    def load(self, path: Path) -> None:
        """Restore the training state; before an average is attached, which is loaded apart."""


def build_engine(bare: PreTrainedModel, options: Options, ranks: Ranks) -> Engine:
    """What trains the model, as ``--parallel`` or ``--deepspeed`` says."""
    if options.deepspeed is not None:
        return DeepSpeedEngine(bare, options, ranks)
    if options.parallel == "accelerate":
        return AccelerateEngine(bare, options, ranks)
    return TorchEngine(bare, options, ranks)


def state_layout(options: Options, ranks: int) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes it."""
    if options.deepspeed is not None:
        return deepspeed.state_layout(options.deepspeed, ranks)
    return TORCH_STATE


def why_not_resumable(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why training state of the layout ``old`` cannot be loaded into ``new``; None if it can."""
    if old == new:
        return None
    if old["written by"] != new["written by"]:
        return (
            f"its training state was written by {old['written by']} and cannot be loaded by "
            f"{new['written by']}; give the --parallel or --deepspeed of then"
        )
    return deepspeed.why_not_resumable(old, new)
