"""The update as one reads it in a paper: a plain loop that the fast paths are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def lerp_reference(
    shadows: Sequence[Sequence[Tensor]],
    live: Sequence[Tensor],
    weights: Sequence[float],
    *,
    guard: bool = False,
) -> Tensor:
    """``shadow <- shadow + weight * (live - shadow)``, in place, tensor by tensor.

    Args:
        shadows: for each profile one tensor per parameter, shaped like ``live``.
        live: the parameters, any floating dtype.
        weights: for each profile ``1 - decay``; 1 gives the parameter, whatever the shadow holds.
        guard: leave elements alone whose parameter is NaN or Inf.

    Returns:
        Number of guarded elements, int64 of shape ``()``.
    """
    skipped = torch.zeros((), dtype=torch.int64, device="cpu")
    for i, parameter in enumerate(live):
        value = parameter.detach().to(shadows[0][i].device, shadows[0][i].dtype)
        finite = torch.isfinite(value)
        skipped += (~finite).sum().cpu()
        for shadow, weight in zip(shadows, weights, strict=True):
            target = torch.where(finite, value, shadow[i]) if guard else value
            precision = torch.float64 if target.dtype is torch.float64 else torch.float32
            if torch.tensor(weight, dtype=precision, device="cpu") == 1:
                shadow[i].copy_(target)
            else:
                shadow[i].lerp_(target, weight)
    return skipped
