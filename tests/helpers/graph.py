"""Stands in for a GPU that records graphs, on the CPU.

While a graph is recorded nothing is computed, as on a GPU: kernels and PyTorch's operators are
noted, with the memory that they have then, and done at each replay. What would make the host wait
is refused meanwhile. The kernel reads its table as the real one does, by addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sharded_ema.averaging.kernels import launches
from sharded_ema.averaging.kernels.launches import StepWeights
from sharded_ema.averaging.kernels.reference import lerp_reference

# Operators that read a number of the device.
WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Recorder(TorchDispatchMode):
    """Notes operators in place of computing them; views are made at once."""

    def __init__(self, work: list[Callable[[], object]]) -> None:
        super().__init__()
        self.work = work
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = func.name().partition(".")[0].partition("::")
        kwargs = kwargs or {}
        assert name not in WAITS, f"{name} waits for the device while a graph is recorded"
        if library != "aten" or func.is_view or name in ("detach", "alias"):
            return func(*args, **kwargs)
        self.operators.append(name)
        given = args[0]
        # The memory that tensors have now, whatever becomes of them.
        args = tree_map_only(Tensor, Tensor.detach, args)
        if func._schema.is_mutable:
            self.work.append(lambda: func(*args, **kwargs))
            return given
        out = func(*args, **kwargs)  # whose memory a replay fills
        self.work.append(lambda: out.copy_(func(*args, **kwargs)))
        return out.fill_(float("nan"))


class Graph:
    """What was recorded.

    Attributes:
        operators: of PyTorch, in order.
        launches: of the kernel.
    """

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.operators: list[str] = []
        self.launches = 0

    @torch.no_grad()
    def replay(self) -> None:
        for each in self.work:
            each()


class Device:
    """The CPU as a GPU whose current stream may record a graph."""

    FAILURES = (RuntimeError,)

    def __init__(self) -> None:
        self.graph: Graph | None = None

    @contextmanager
    def recording(self) -> Iterator[Graph]:
        graph = self.graph = Graph()
        recorder = Recorder(graph.work)
        try:
            with recorder:
                yield graph
        finally:
            self.graph = None
            graph.operators = recorder.operators

    def is_current_stream_capturing(self) -> bool:
        return self.graph is not None

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def synchronize(self, device: torch.device) -> None:
        assert self.graph is None, "the host waits while a graph is recorded"

    def launch(
        self, table: Tensor, skipped: Tensor, weights: Any, *, guard: bool, kinds: int, double: bool
    ) -> None:
        """Note the kernel, or run it."""
        kernel = Kernel(table, skipped, weights, guard=guard, double=double)
        if self.graph is None:
            kernel.run()
        else:
            self.graph.launches += 1
            self.graph.work.append(kernel.run)


class Kernel:
    """What the kernel does, which knows all memory by its address."""

    def __init__(
        self, table: Tensor, skipped: Tensor, weights: Any, *, guard: bool, double: bool
    ) -> None:
        self.rows, self.table, self.skipped = len(table), table.data_ptr(), skipped.data_ptr()
        self.guard, self.dtype = guard, torch.float64 if double else torch.float32
        self.by_step = isinstance(weights, StepWeights)
        if self.by_step:
            self.counter, self.weights = weights.counter.data_ptr(), weights.rows.data_ptr()
            self.steps, self.profiles = weights.rows.shape
            self.period = weights.period
        else:
            self.profiles, self.fixed = len(weights), list(weights)

    def values(self) -> list[float]:
        """Weights of the step."""
        if not self.by_step:
            return self.fixed
        step, first = memory(self.counter, 2, torch.int64).tolist()
        index = step - first
        if index >= self.steps:
            index = self.steps - self.period + (index - self.steps) % self.period
        found = memory(self.weights, self.steps * self.profiles, torch.float64)
        values: list[float] = found.view(self.steps, -1)[max(index, 0)].tolist()
        return values

    def run(self) -> None:
        values = self.values()
        if values[0] < 0.0:
            return
        table = memory(self.table, self.rows * (3 + self.profiles), torch.int64)
        for address, numel, kind, *targets in table.view(self.rows, -1).tolist():
            if not numel:
                continue
            live = memory(address, numel, DTYPES[kind // 2])
            shadows = [[memory(target, numel, self.dtype)] for target in targets]
            if self.by_step and self.guard:
                for (shadow,) in shadows:
                    healed = torch.where(torch.isfinite(shadow), shadow, live.to(self.dtype))
                    shadow.copy_(healed)
            found = lerp_reference(shadows, [live], values, guard=self.guard)
            memory(self.skipped, 1, torch.int64).add_(int(found) if self.guard else 0)


def memory(address: int, numel: int, dtype: torch.dtype) -> Tensor:
    """What lies at an address."""
    raw = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
    return torch.from_numpy(np.frombuffer(raw, np.uint8)).view(dtype)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let parameters on the CPU count as those of a device that records graphs."""
    device = Device()
    monkeypatch.setattr("sharded_ema.model.devices._module", lambda asked: device)
    for module in ("devices", "followed"):
        monkeypatch.setattr(f"sharded_ema.model.{module}.is_accelerator", lambda asked: True)
    monkeypatch.setattr(launches, "DEVICES", {"cpu"})
    monkeypatch.setattr(launches, "launch", device.launch)
    module = SimpleNamespace(FAILURES=Device.FAILURES)
    monkeypatch.setattr(launches, "triton_module", lambda: module)
    return device
