"""Loss on the held-out text, the same number on any number of ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ranks import Ranks


def token_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next byte: ``(sequences, context)`` in float32."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )
    return flat.view(windows.shape[0], -1)


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    windows: torch.Tensor,
    ranks: Ranks,
    batch_size: int,
    precision: AbstractContextManager[Any],
) -> float:
    """Mean loss per byte over ``windows``; every rank takes its part and gets the result.

    A sharded forward pass is collective, so all ranks make equally many of them, of the same
    size; where the sequences do not divide, some are computed and not counted.
    """
    share = -(-len(windows) // ranks.parts)
    mine = torch.arange(share) * ranks.parts + ranks.part
    counted = (mine < len(windows)).to(ranks.device, torch.float64)
    part = windows[mine.clamp(max=len(windows) - 1)].to(ranks.device)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    was_training = model.training
    model.eval()
    try:
        with precision:
            for start in range(0, share, batch_size):
                these = slice(start, start + batch_size)
                sums = token_losses(model, part[these]).double().sum(dim=1)
                total += (sums * counted[these]).sum()
    finally:
        model.train(was_training)
    return float(ranks.sum(total)) / (len(windows) * (windows.shape[1] - 1))
