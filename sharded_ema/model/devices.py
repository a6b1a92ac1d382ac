"""Devices that compute on their own: one set of rules for all of them.

What is not the CPU runs behind the host: a copy that was begun may not have ended. CUDA, ROCm
(which PyTorch calls ``cuda``), XPU, NPU, HPU and the like have streams and events of one shape,
found through ``torch.get_device_module``. One without these is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sharded_ema.errors import ConfigError
from sharded_ema.model.memory import one_of_each_storage


def is_accelerator(device: torch.device) -> bool:
    """Whether work on a device goes on while the host does something else."""
    return device.type not in ("cpu", "meta")


def wait_for(devices: Iterable[torch.device]) -> None:
    """Return when everything that was begun on these devices has ended."""
    for device in set(devices):
        if is_accelerator(device):
            _module(device).synchronize(device)


def mark(device: torch.device) -> Any:
    """An event behind all that was begun on a device; its ``synchronize()`` waits for it."""
    module = _module(device)
    # One that blocks leaves the processor to others while the host waits; CUDA has both kinds.
    event = module.Event(blocking=True) if device.type == "cuda" else module.Event()
    event.record(module.current_stream(device))
    return event


class SideStream:
    """Work of a device beside what its current stream does.

    Args:
        device: an accelerator.

    Attributes:
        is_ahead: whether the stream that work was begun beside has not come after it yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, _module(device)
        self._stream = self._module.Stream(device)
        self._end: Any = None
        self._beside: Any = None
        self.is_ahead = False

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Memory of these tensors that is given back is not used again while work is under way."""
        for tensor in one_of_each_storage(tensors):
            record_use(tensor, self._stream)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is begun in the block goes here, after all that the current stream has begun."""
        self._beside = self._module.current_stream(self._device)
        self._stream.wait_event(mark(self._device))
        with on(self._device), self._module.stream(self._stream):
            try:
                yield
            finally:  # of a block that was interrupted some may have begun
                self._end, self.is_ahead = mark(self._device), True

    def follow(self) -> None:
        """What the current stream begins from now on comes after that. The host does not wait."""
        current = self._module.current_stream(self._device)
        current.wait_event(self._end)
        # Another stream than that of the training may look at an average; the training's has
        # still to follow then.
        self.is_ahead &= current != self._beside


def record_use(tensor: Tensor, stream: Any) -> None:
    """Have the allocator wait for a stream before it gives memory of a tensor away."""
    tensor.record_stream(stream)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one for a while, as what launches kernels of its own needs."""
    if not is_accelerator(device):
        return nullcontext()
    entered: AbstractContextManager[Any] = _module(device).device(device)
    return entered


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a graph instead of computing."""
    if not is_accelerator(device):
        return False
    capturing = getattr(_module(device), "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())


def check_device(device: torch.device) -> torch.device:
    """A device that is there and that this library can use; with its index, if it has several.

    Raises:
        ConfigError: there is no such device, or none of the shape that is needed.
    """
    if device.type == "meta":
        raise ConfigError("device='meta' has no memory; leave device out to keep each parameter's")
    if not is_accelerator(device):
        return device
    module = _module(device)
    if not module.is_available() or (device.index or 0) >= module.device_count():
        raise ConfigError(
            f"device={str(device)!r} was asked for and there is no such device on this machine; "
            "leave device out to keep the shadow where each parameter is, or pass 'cpu'"
        )
    return device


def _module(device: torch.device) -> Any:
    try:
        module: Any = torch.get_device_module(device)
    except RuntimeError:
        module = None
    names = (
        *("synchronize", "Event", "Stream", "stream", "current_stream"),
        *("is_available", "device_count"),
    )
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise ConfigError(
            f"devices of the type {device.type!r} are not supported: PyTorch's module for them has "
            f"no {', '.join(missing)}"
        )
    return module
