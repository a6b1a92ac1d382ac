"""The update of a shadow in host memory, of parameters that lie on a GPU.

The parameters come over on a stream of their own, some at a time through a bounded buffer of the
device, into pinned memory that has room for all of them. So nothing waits for the host: whatever
the current stream does later comes after the last copy, and a thread averages each chunk once its
copy has ended. Who looks at the shadow waits for that thread first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sharded_ema.averaging.kernels.batches import blocks
from sharded_ema.averaging.kernels.fused import is_laid_out_alike
from sharded_ema.model.devices import SideStream, is_accelerator, mark
from sharded_ema.model.internals.pytorch import foreach_copy_

# Bytes at whose multiples a chunk ends: the sizes of all elements.
_ALIGNMENT = 16


class Update(Protocol):
    """The update of a chunk that has come over: a plan of tensors in host memory."""

    def run(self, weights: Sequence[float]) -> None:
        """Move its shadows."""
        ...

    def take_skipped(self) -> int:
        """Elements left alone since the last call."""
        ...


#: Makes it, of shadows by profile and of the parameters as they lie in host memory.
MakeUpdate = Callable[[Sequence[Sequence[Tensor]], Sequence[Tensor]], Update]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What comes over at once.

    Attributes:
        live: blocks of the parameters.
        packed: the same blocks in the buffer of the device.
        sent: the bytes of that buffer.
        landed: the same bytes in host memory.
        update: of these blocks.
    """

    live: list[Tensor]
    packed: list[Tensor]
    sent: Tensor
    landed: Tensor
    update: Update


class Offload:
    """Parameters of one device whose shadows lie in host memory.

    Args:
        shadows: for each profile one tensor per parameter.
        live: the parameters, with elements.
        make_update: see above.
        buffer_bytes: of the device, that they pass through.

    Attributes:
        device: theirs.
        live: the parameters.
        narrows: whether some are more precise than their shadow.
        num_bytes: allocated for it, on the device and on the host.
        side: what reads them.
    """

    @torch.no_grad()
    def __init__(
        self,
        shadows: Sequence[Sequence[Tensor]],
        live: Sequence[Tensor],
        *,
        make_update: MakeUpdate,
        buffer_bytes: int,
    ) -> None:
        self.device, self.live = live[0].device, list(live)
        pairs = zip(live, shadows[0], strict=True)
        self.narrows = any(view.dtype.itemsize < t.dtype.itemsize for t, view in pairs)
        cut = list(_cut(shadows, live, buffer_bytes))
        sizes = [_aligned(sum(t.nbytes for t in block)) for block, _ in cut]
        buffer = torch.empty(max(sizes), dtype=torch.uint8, device=self.device)
        self.num_bytes = buffer.numel() + sum(sizes)
        self._chunks: list[Chunk] = []
        for (block, targets), size in zip(cut, sizes, strict=True):
            # Each for itself: PyTorch rounds what is pinned up to powers of two.
            landed = torch.empty(
                size, dtype=torch.uint8, device="cpu", pin_memory=is_accelerator(self.device)
            )
            update = make_update(targets, _carve(landed, block))
            self._chunks.append(
                Chunk(block, _carve(buffer[:size], block), buffer[:size], landed, update)
            )
        self.side = SideStream(self.device)
        self.side.hold(live)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sharded_ema_update")
        self._under_way: Future[None] | None = None

    @torch.no_grad()
    def begin(self, weights: Sequence[float]) -> None:
        """Begin an update; the one before has ended. The host waits for nothing.

        The parameters may change in what comes after :attr:`side`.
        """
        copied = []
        with self.side.entered():
            for chunk in self._chunks:
                foreach_copy_(chunk.packed, chunk.live)
                foreach_copy_([chunk.landed], [chunk.sent], non_blocking=True)
                copied.append(mark(self.device))
        self._under_way = self._thread.submit(self._average, list(weights), copied)

    def _average(self, weights: Sequence[float], copied: Sequence[Any]) -> None:
        for chunk, event in zip(self._chunks, copied, strict=True):
            event.synchronize()
            chunk.update.run(weights)

    @property
    def is_under_way(self) -> bool:
        """Whether an update was begun and :meth:`finish` was not called since."""
        return self._under_way is not None

    def finish(self) -> BaseException | None:
        """Return when the update has ended; what it has failed with, if it has."""
        if self._under_way is None:
            return None
        failure = self._under_way.exception()
        self._under_way = None  # not before: the wait may be interrupted
        return failure

    def take_skipped(self) -> int:
        """Elements skipped since the last call."""
        return sum(chunk.update.take_skipped() for chunk in self._chunks)


def comes_over(live: Tensor, views: Sequence[Tensor]) -> bool:
    """Whether a parameter lies on a device and its shadows in host memory.

    Args:
        live: real numbers.
        views: its shadow in each profile.
    """
    return (
        is_accelerator(live.device)
        and live.numel() > 0
        and all(view.device.type == "cpu" for view in views)
    )


def _aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _ALIGNMENT


def _cut(
    shadows: Sequence[Sequence[Tensor]], live: Sequence[Tensor], limit: int
) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """Blocks of parameters of one dtype, and of their shadows, that take at most so many bytes."""
    by_dtype: dict[torch.dtype, list[Sequence[Tensor]]] = {}
    for row in zip(live, *shadows, strict=True):
        parameter, *views = row
        if is_laid_out_alike(parameter, views):  # in the order in which they lie in memory
            row = tuple(t.as_strided((t.numel(),), (1,)) for t in row)
        by_dtype.setdefault(parameter.dtype, []).append(row)
    for dtype, rows in by_dtype.items():
        parameters, *columns = map(list, zip(*rows, strict=True))
        numel = max(1, limit // dtype.itemsize)
        yield from blocks(columns, parameters, list(range(len(rows))), numel)


def _carve(buffer: Tensor, blocks: Sequence[Tensor]) -> list[Tensor]:
    """Views of some bytes like these blocks of one dtype, in C order."""
    numels = [block.numel() for block in blocks]
    flat = buffer[: sum(numels) * blocks[0].element_size()].view(blocks[0].dtype)
    return [
        piece.view(block.shape) for piece, block in zip(flat.split(numels), blocks, strict=True)
    ]
