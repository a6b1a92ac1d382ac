"""What trains the model: the parts of a step and of a checkpoint that frameworks do differently."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_ema import ShardedEMA


class Engine(ABC):
    """A model in training, with its optimizer.

    Attributes:
        model: forward passes go through it, and the average is made of it.
        layout: how the model is spread over the ranks, for the user to read.
    """

    model: nn.Module
    layout: str

    @abstractmethod
    def precision(self) -> AbstractContextManager[Any]:
        """Context of every forward pass."""

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Context of forward and backward pass of one micro-batch; ``last`` of its step or not."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of ``loss``: a sum over the micro-batches, a mean over the parts."""

    @abstractmethod
    def step(self, rate: float) -> torch.Tensor | float | None:
        """Clip and apply the gradients; their norm, where it is known."""

    @abstractmethod
    def attach(self, ema: ShardedEMA) -> None:
        """Let every step from now on move the average."""

    @abstractmethod
    def gather(self) -> dict[str, torch.Tensor]:
        """The whole model's state by name, in memory of the first rank; on others nothing.

        All ranks take part.
        """

    @abstractmethod
    def save(self, path: Path, ema: ShardedEMA | None, step: int) -> None:
        """Write the training state into the directory ``path``, and the average to ``path/ema``."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Restore the training state; before an average is attached, which is loaded apart."""
