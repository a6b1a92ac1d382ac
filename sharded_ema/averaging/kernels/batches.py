"""The update in batches, with PyTorch's horizontally fused ``_foreach`` kernels.

Parameters that have the shadow's dtype and device go to the fused kernel as they are, all at once
where they are read once. All others pass through a small stage buffer that stays in cache, so that
no conversion ever needs a temporary of the size of a parameter.

``lerp`` and nothing else: it has an exact fixed point (a shadow equal to its parameter stays so,
bit for bit) and its result for an element does not depend on where the tensor was cut, which makes
a sharded average equal to an unsharded one under ``torch.equal``. Weights are Python floats: a
0-d tensor would be read back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_ema.model.devices import is_accelerator
from sharded_ema.model.internals.pytorch import foreach_copy_, foreach_lerp_, foreach_norm

# Elements of the stage buffer (4 MiB of fp32): fits the second-level caches of today's CPUs and
# GPUs, and is large enough for the cost of a kernel launch to vanish.
STAGE_NUMEL = 1 << 20
# A batch that is read several times (looked at and averaged, or averaged for several profiles)
# is small enough that only the first time goes to memory.
REREAD_NUMEL = 1 << 19
# Below this size the cost of a call per tensor exceeds that of a copy into the stage.
TINY_NUMEL = 1 << 12


@dataclass(slots=True)
class Batch:
    """Tensors that one pass updates together; all of one source dtype and one device each.

    Attributes:
        live: blocks of the parameters.
        shadows: for each profile the blocks of the shadow, shaped like ``live``.
        stage: blocks of the stage buffer, or ``None`` where ``live`` can be used directly.
        buffer: the part of the stage buffer that ``stage`` fills, 1-D.
    """

    live: list[Tensor]
    shadows: list[list[Tensor]]
    stage: list[Tensor] | None = None
    buffer: Tensor | None = None


@torch.no_grad()
def make_batches(
    shadows: Sequence[Sequence[Tensor]], live: Sequence[Tensor], *, guard: bool
) -> list[Batch]:
    """Batches that together cover every element once.

    Args:
        shadows: for each profile one tensor per parameter.
        live: the parameters; empty ones are dropped.
        guard: whether non-finite elements will be looked for.
    """
    live, *shadows = _join([live, *shadows])
    direct: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    staged: dict[tuple[_Kind, _Kind], list[int]] = {}
    for i, parameter in enumerate(live):
        shadow = shadows[0][i]
        same = parameter.dtype == shadow.dtype and parameter.device == shadow.device
        # A GPU cannot branch on what it finds without a host sync, so it always masks in the
        # stage; a CPU looks first and stages only what is too small to be looked at alone.
        looks = is_accelerator(parameter.device) or parameter.numel() < TINY_NUMEL
        if same and not (guard and looks):
            direct.setdefault(_kind(shadow), []).append(i)
        else:
            staged.setdefault((_kind(shadow), _kind(parameter)), []).append(i)
    batches: list[Batch] = []
    for indices in direct.values():
        if not guard and len(shadows) == 1:
            batches.append(
                Batch([live[i] for i in indices], [[s[i] for i in indices] for s in shadows])
            )
        else:
            batches += [Batch(b, s) for b, s in blocks(shadows, live, indices, REREAD_NUMEL)]
    buffers: dict[_Kind, Tensor] = {}
    for (kind, _), indices in staged.items():
        if kind not in buffers:
            device, dtype = kind
            buffers[kind] = torch.empty(STAGE_NUMEL, dtype=dtype, device=device)
        for block, targets in blocks(shadows, live, indices, STAGE_NUMEL):
            views, position = [], 0
            for tensor in block:
                view = buffers[kind][position : position + tensor.numel()]
                views.append(view.as_strided(tensor.shape, _dense_strides(tensor)))
                position += tensor.numel()
            batches.append(Batch(block, targets, views, buffers[kind][:position]))
    return batches


#: What one kernel takes together.
_Kind = tuple[torch.device, torch.dtype]


def _kind(tensor: Tensor) -> _Kind:
    return tensor.device, tensor.dtype


def _join(columns: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Make one of tensors that follow each other in memory in every column; drop empty ones.

    Frameworks that flatten parameters leave views of one buffer. Updating the buffer as a whole
    saves a kernel call for each of them.
    """
    runs: list[tuple[Sequence[Tensor], int]] = []  # the first of a run, and elements of the run
    for row in zip(*columns, strict=True):
        numel = row[0].numel()
        if not numel:
            continue
        first, count = runs[-1] if runs else (row, 0)
        if count and all(_follows(a, count, b) for a, b in zip(first, row, strict=True)):
            runs[-1] = (first, count + numel)
        else:
            runs.append((row, numel))
    return [
        [
            first[i] if count == first[i].numel() else first[i].as_strided((count,), (1,))
            for first, count in runs
        ]
        for i in range(len(columns))
    ]


def _follows(first: Tensor, count: int, tensor: Tensor) -> bool:
    """Whether ``tensor`` continues the ``count`` elements of the storage from ``first`` on."""
    return (
        first.dim() == tensor.dim() == 1
        and first.stride(0) == tensor.stride(0) == 1
        and first.dtype == tensor.dtype
        and tensor.data_ptr() == first.data_ptr() + count * first.element_size()
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )


def blocks(
    shadows: Sequence[Sequence[Tensor]], live: Sequence[Tensor], indices: list[int], limit: int
) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """Group blocks of at most ``limit`` elements into batches of at most ``limit`` elements."""
    block: list[Tensor] = []
    targets: list[list[Tensor]] = [[] for _ in shadows]
    filled = 0
    for i in indices:
        for pieces in _split([live[i], *(s[i] for s in shadows)], limit):
            if filled + pieces[0].numel() > limit:
                yield block, targets
                block, targets, filled = [], [[] for _ in shadows], 0
            block.append(pieces[0])
            for target, piece in zip(targets, pieces[1:], strict=True):
                target.append(piece)
            filled += pieces[0].numel()
    if block:
        yield block, targets


def _split(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Cut equally shaped tensors in step into views of at most ``limit`` elements."""
    first = tensors[0]
    if first.numel() <= limit:
        yield tensors
    elif all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        for start in range(0, first.numel(), limit):
            yield [t[start : start + limit] for t in flat]
    else:
        dim = max(range(first.dim()), key=lambda d: first.shape[d])
        half = first.shape[dim] // 2
        yield from _split([t.narrow(dim, 0, half) for t in tensors], limit)
        yield from _split([t.narrow(dim, half, first.shape[dim] - half) for t in tensors], limit)


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a gapless tensor whose dimensions lie in memory in the order of ``tensor``'s."""
    strides = [0] * tensor.dim()
    step = 1
    for dim in sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), -d)):
        strides[dim] = step
        step *= tensor.shape[dim]
    return tuple(strides)


# ---------------------------------------------------------------------- passes


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
    if not is_accelerator(skipped.device) and is_finite(batch, source):
        _lerp(batch, source, weights)
        return
    for i, value in enumerate(source):
        finite = torch.isfinite(value)
        skipped += value.numel() - finite.sum()
        for shadow, weight in zip(batch.shadows, weights, strict=True):
            target = torch.where(finite, value, shadow[i])
            _lerp_list([shadow[i]], [target], weight)


def is_finite(
    batch: Batch, source: Sequence[Tensor] | None = None, *, largest: float | None = None
) -> bool:
    """Whether all parameters of the batch are finite. Waits for the device.

    A norm may overflow although every element is finite; the answer is then a cautious "no".

    Args:
        source: in place of the parameters.
        largest: what is still finite in a less precise shadow.
    """
    source = _fill_stage(batch) if source is None else source
    if batch.buffer is not None:
        return bool(torch.isfinite(batch.buffer.sum()))
    norms = torch.stack(foreach_norm(list(source), 2))
    return bool((torch.isfinite(norms) if largest is None else norms <= largest).all())


def _fill_stage(batch: Batch) -> list[Tensor]:
    if batch.stage is None:
        return batch.live
    foreach_copy_(batch.stage, batch.live)
    return batch.stage


def _lerp(batch: Batch, source: list[Tensor], weights: Sequence[float]) -> None:
    for shadow, weight in zip(batch.shadows, weights, strict=True):
        _lerp_list(shadow, source, weight)


def _lerp_list(shadow: list[Tensor], source: list[Tensor], weight: float) -> None:
    """``lerp``, but for a weight that leaves nothing of the shadow.

    ``lerp`` would then take away 0 times the difference, which is NaN where the shadow is not
    finite and where the difference overflows.
    """
    # A kernel has the weight in fp32 unless the shadow is fp64.
    whole = 1.0 if shadow[0].dtype is torch.float64 else 1.0 - 2.0**-25
    if weight >= whole:
        foreach_copy_(shadow, source)
    else:
        foreach_lerp_(shadow, source, weight)


def heal(shadow: Tensor, live: Tensor) -> None:
    """Elements of a shadow that are NaN or Inf become the parameter's; nothing waits for a GPU.

    Args:
        shadow, live: of one shape.
    """
    for into, value in _split([shadow, live], STAGE_NUMEL):
        found = value.to(into.device, into.dtype)
        into.copy_(torch.where(torch.isfinite(into), into, found))
