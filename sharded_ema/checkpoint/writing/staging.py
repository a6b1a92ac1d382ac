"""A copy of a state dict in host memory, so that the average can move on while it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_ema.model.devices import is_accelerator, mark
from sharded_ema.model.internals.pytorch import foreach_copy_
from sharded_ema.model.pieces import FlatShard, Piece, pieces_of

# Every piece begins where the widest element may.
_ALIGNMENT = 16


class Staging:
    """One host buffer, used again by every save; pinned if it is copied to from a GPU.

    Attributes:
        num_bytes: size of the buffer, 0 before the first use.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._copied: list[Any] = []

    @property
    def num_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel()

    @torch.no_grad()
    @torch.inference_mode(False)
    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same state with values of its own; what was copied before is overwritten.

        Copies from a GPU are only begun: what the GPU does later waits for them, who reads the
        result calls :meth:`wait` first.
        """
        pieces = {key: pieces_of(value) if _writes(value) else [] for key, value in state.items()}
        tensors = [tensor for of_one in pieces.values() for _, tensor in of_one]
        into = iter(self._carve(tensors))
        staged: dict[str, Tensor] = {}
        copies: list[Tensor] = []
        for key, value in state.items():
            mine: list[Piece] = [(box, next(into)) for box, _ in pieces[key]]
            copies += (copy for _, copy in mine)
            staged[key] = FlatShard(
                value.shape,
                mine,
                dtype=value.dtype,
                device=torch.device("cpu"),
                writes=_writes(value),
                reads=False,
            )
        if copies:
            foreach_copy_(copies, tensors, non_blocking=True)
        devices = {t.device for t in tensors if is_accelerator(t.device)}
        self._copied = [mark(device) for device in devices]
        return staged

    def wait(self) -> None:
        """Return when the last copy is complete."""
        for event in self._copied:
            event.synchronize()

    def _carve(self, tensors: list[Tensor]) -> list[Tensor]:
        """Views of the buffer like ``tensors``, in C order."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        if self.num_bytes < end:
            self._buffer = None  # before the new one, so that there are never two
            pinned = any(is_accelerator(tensor.device) for tensor in tensors)
            self._buffer = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        buffer = (
            self._buffer
            if self._buffer is not None
            else torch.empty(0, dtype=torch.uint8, device="cpu")
        )
        return [
            buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=True)
        ]


def _writes(value: Tensor) -> bool:
    return value.writes if isinstance(value, FlatShard) else True
