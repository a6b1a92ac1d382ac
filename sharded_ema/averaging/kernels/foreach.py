"""The update on batches, with PyTorch's horizontally fused ``_foreach`` kernels.

``lerp`` and nothing else: it has an exact fixed point (a shadow equal to its parameter stays so,
bit for bit) and its result for an element does not depend on where the tensor was cut, which makes
a sharded average equal to an unsharded one under ``torch.equal``. Weights are Python floats: a
0-d tensor would be read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_ema.averaging.kernels.batches import Batch


def lerp_batch(batch: Batch, weights: Sequence[float]) -> None:
    """``shadow <- lerp(shadow, live, weight)`` for every profile, one read of ``live``."""
    _lerp(batch, _fill_stage(batch), weights)


def lerp_batch_guarded(batch: Batch, weights: Sequence[float], skipped: Tensor) -> None:
    """The same, but elements whose parameter is NaN or Inf keep their shadow.

    Args:
        skipped: int64 of shape ``()`` on the shadow's device; grows by the elements left alone. On
            a GPU nothing here waits for the device.
    """
    source = _fill_stage(batch)
    if not skipped.is_cuda and is_finite(batch, source):
        _lerp(batch, source, weights)
        return
    for i, value in enumerate(source):
        finite = torch.isfinite(value)
        skipped += value.numel() - finite.sum()
        for shadow, weight in zip(batch.shadows, weights, strict=True):
            shadow[i].lerp_(torch.where(finite, value, shadow[i]), weight)


def is_finite(batch: Batch, source: Sequence[Tensor] | None = None) -> bool:
    """Whether all parameters of the batch are finite. Waits for the device.

    A norm may overflow although every element is finite; the answer is then a cautious "no".
    """
    source = _fill_stage(batch) if source is None else source
    if batch.buffer is not None:
        return bool(torch.isfinite(batch.buffer.sum()))
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(list(source), 2))).all())


def _fill_stage(batch: Batch) -> list[Tensor]:
    if batch.stage is None:
        return batch.live
    torch._foreach_copy_(batch.stage, batch.live)
    return batch.stage


def _lerp(batch: Batch, source: list[Tensor], weights: Sequence[float]) -> None:
    for shadow, weight in zip(batch.shadows, weights, strict=True):
        torch._foreach_lerp_(shadow, source, weight)
