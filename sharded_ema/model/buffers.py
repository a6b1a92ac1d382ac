"""The buffers of a model in a swap: what its body changes in them is put back as it ends."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from sharded_ema.model.internals.pytorch import own_buffers
from sharded_ema.model.inventory import Inventory, Named


class HeldBuffers:
    """The persistent buffers that are not averaged, as they are now, with copies of their values.

    A forward in training mode changes batch statistics, ``update_bn`` computes them anew: right for
    the average that stands in, and wrong for the weights that come back. What is not persistent is
    no state of a model but scratch memory, and left alone.

    Args:
        inventory: of the model.
    """

    def __init__(self, inventory: Inventory) -> None:
        named = (*inventory.buffers, *inventory.ignored)
        self._held = [
            (each, buffer, buffer.detach().clone())
            for each in named
            if (buffer := own_buffers(each.owner).get(each.attribute)) is not None
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers."""
        return [buffer for _, buffer, _ in self._held]

    @property
    def num_bytes(self) -> int:
        """Of the copies."""
        return sum(copy.numel() * copy.element_size() for _, _, copy in self._held)

    def put_back(self) -> None:
        """Give every buffer its values, and its name to the one that had it."""
        for named, buffer, copy in self._held:
            registered = own_buffers(named.owner)
            now = registered.get(named.attribute)
            # One that was converted or moved, with the rest of its model, stays as that is.
            if now is None or (now.dtype, now.device) == (buffer.dtype, buffer.device):
                registered[named.attribute] = now = buffer
            fill(now, copy)


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor, whatever shape it has by now; it keeps dtype and device."""
    if tensor.shape != value.shape:
        tensor.data = value.to(tensor.device, tensor.dtype, copy=True)
        return
    # Made in inference mode, a tensor can be written to in inference mode only.
    with torch.inference_mode() if tensor.is_inference() else nullcontext():
        tensor.copy_(value)


def running_statistics(named: Iterable[Named]) -> list[Named]:
    """Those of some buffers that layers move in a forward in training mode, such as BatchNorm's."""
    return [
        each
        for each in named
        if each.attribute.startswith("running_") and each.tensor.is_floating_point()
    ]
