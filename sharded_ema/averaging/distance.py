"""How far an average is from the weights it averages, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_ema.averaging.average import Average
from sharded_ema.model.precision import real_view

# Elements of a rank that a sampled distance looks at.
SAMPLE_NUMEL = 1 << 18

#: This rank's part of a distance: sums of squares of the difference and of the weights.
Part = tuple[float, float]


def partial_distances(
    average: Average, live: Sequence[Tensor], counted: Sequence[int], *, sampled: bool
) -> dict[str, Part]:
    """This rank's part of the distance of every profile.

    Args:
        live: this rank's part of every averaged tensor.
        counted: positions of those that no other rank counts.
        sampled: look at no more than about 2**18 elements, at a fixed stride.
    """
    return {
        name: squared_distance(
            [views[i] for i in counted], [live[i] for i in counted], sampled=sampled
        )
        for name, views in average.shadow.views.items()
    }


def relative_distance(parts: Sequence[Part]) -> float:
    """Norm of the difference over that of the weights, from the parts of all ranks."""
    apart, norm = sum(a for a, _ in parts), sum(n for _, n in parts)
    return math.sqrt(apart / norm) if norm else 0.0


@torch.no_grad()
def squared_distance(views: Sequence[Tensor], live: Sequence[Tensor], *, sampled: bool) -> Part:
    """``(sum (shadow - live)**2, sum live**2)`` over this rank's elements, in float64.

    Args:
        sampled: look at no more than about 2**18 elements, at a fixed stride.
    """
    total = sum(t.numel() for t in live)
    stride = max(1, math.ceil(total / SAMPLE_NUMEL)) if sampled else 1
    sums: dict[torch.device, list[Tensor]] = {}
    for view, parameter in zip(views, live, strict=True):
        if parameter.numel():
            a = real_view(view).reshape(-1)[::stride].double()
            b = real_view(parameter).detach().reshape(-1)[::stride].to(a.device).double()
            pair = torch.stack([(a - b).square().sum(), b.square().sum()])
            sums.setdefault(a.device, []).append(pair)
    # One wait for each device, not for each tensor.
    totals = [torch.stack(pairs).sum(0).tolist() for pairs in sums.values()]
    return sum(apart for apart, _ in totals), sum(norm for _, norm in totals)
