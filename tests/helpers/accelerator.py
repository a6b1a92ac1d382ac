"""Stands in for a GPU and PyTorch's module of it: streams and events, on the CPU.

The current stream works at once, any other only when something waits for it. So what should have
waited and did not finds old values, or new ones, where a real device might do well by luck.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sharded_ema.averaging import kernels
from sharded_ema.averaging.kernels import offload
from sharded_ema.averaging.kernels.offload import Offload


class Stream:
    """What a stream has still to do; ``name`` is for the record."""

    def __init__(self, device: Accelerator, name: str) -> None:
        self.device, self.name = device, name
        self.left: list[Callable[[], None]] = []

    def do(self, work: Callable[[], None]) -> None:
        with self.device.lock:
            self.left.append(work)
            if self is self.device.main:
                self.run(lambda: False)

    def run(self, enough: Callable[[], bool]) -> None:
        with self.device.lock, torch.no_grad():
            while self.left and not enough():
                self.left.pop(0)()

    def wait_event(self, event: Event) -> None:
        self.device.note("wait", self, event)
        self.do(event.reach)


class Event:
    """Is reached once its stream has come so far."""

    def __init__(self, device: Accelerator) -> None:
        self.device, self.stream, self.reached = device, device.main, False

    def record(self, stream: Stream) -> None:
        self.stream = stream
        self.device.note("record", stream, self)

        def reached() -> None:
            self.reached = True

        stream.do(reached)

    def reach(self) -> None:
        self.stream.run(lambda: self.reached)
        assert self.reached

    def synchronize(self) -> None:
        """The host waits; no sooner than the test lets it."""
        if threading.current_thread() is threading.main_thread():
            self.device.note("host waits", self.stream, self)
        else:
            assert self.device.let_go.wait(60)
        self.reach()


class Accelerator:
    """The module of the device.

    Attributes:
        seen: what was begun, in order: what, on which stream, and the event if there is one.
        let_go: whether threads get on that wait for an event.
        held: addresses of memory that waits for a side stream before it is used again.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.let_go = threading.Event()
        self.let_go.set()
        self.main = Stream(self, "main")
        self._current = self.main
        self.seen: list[tuple[str, str, Event | None]] = []
        self.held: set[int] = set()

    def note(self, what: str, stream: Stream, event: Event | None = None) -> None:
        self.seen.append((what, stream.name, event))

    def take_seen(self) -> list[tuple[str, str]]:
        """What was begun since the last call, without the events."""
        seen, self.seen = self.seen, []
        return [(what, name) for what, name, _ in seen]

    def begin(self, what: str, work: Callable[[], None]) -> None:
        """Some work on the current stream."""
        self.note(what, self._current)
        self._current.do(work)

    def Event(self) -> Event:
        return Event(self)

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self, "side")

    def current_stream(self, device: torch.device) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def hold(self, tensor: torch.Tensor, stream: Stream) -> None:
        assert stream is not self.main
        self.held.add(tensor.untyped_storage().data_ptr())

    def synchronize(self, device: torch.device) -> None:
        self.note("host waits", self.main)


def stand_in(monkeypatch: pytest.MonkeyPatch, *, offloads: bool = True) -> Accelerator:
    """Let parameters on the CPU count as those of a device.

    Args:
        offloads: and their shadows as on the host.
    """
    device = Accelerator()
    monkeypatch.setattr("sharded_ema.model.devices._module", lambda asked: device)
    monkeypatch.setattr("sharded_ema.model.devices.record_use", device.hold)
    if not offloads:
        return device

    def copy(into: list[Any], source: list[Any], non_blocking: bool = False) -> None:
        device.begin("copy", lambda: torch._foreach_copy_(into, source))

    def finish(self: Offload) -> BaseException | None:
        device.let_go.set()  # whoever waits, must
        return right(self)

    def make(self: Offload, *args: Any, **options: Any) -> None:
        with monkeypatch.context() as patch:  # what has come over lies on the host
            patch.setattr(kernels, "comes_over", lambda live, views: False)
            made(self, *args, **options)

    right, made = Offload.finish, Offload.__init__
    monkeypatch.setattr(kernels, "comes_over", lambda live, views: live.numel() > 0)
    monkeypatch.setattr(Offload, "__init__", make)
    monkeypatch.setattr(offload, "foreach_copy_", copy)
    monkeypatch.setattr(Offload, "finish", finish)
    return device
