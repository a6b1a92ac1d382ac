"""What an update costs on a GPU, in one table: ``python launch/bench/gpu.py``, at most 8 minutes.

Rates are bytes that an update has to move over the time that the device takes for it, beside those
of a copy on the same device. Host times are those until the call returns. The last rows are a
training step under ``fully_shard``, with and without the average. The tests of ``tests/gpu`` run in
what is left of the time. It takes 10 GB of the device. ``--device cpu`` tries it out on next
to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from measure import ROOT, append_rows, machine
from sharded_ema import ShardedEMA
from update import DECAY, module_of

SECONDS = 480.0
COLUMNS = (
    *("date", "git sha", "torch", "python", "device", "case", "row"),
    *("median_ms", "gb_per_s", "share_of_copy"),
)
# What keeps the device busy until the host has enqueued all that is timed.
HEAD_START_CYCLES = 100_000_000
COPY = "copy of the same bytes"


@dataclass(frozen=True)
class Line:
    """One thing to time.

    Attributes:
        name: of the row.
        call: what is timed.
        num_bytes: that it has to move; 0 where that says nothing.
    """

    name: str
    call: Callable[[], object]
    num_bytes: int = 0


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured."""

    device: torch.device
    rounds: int

    @property
    def is_gpu(self) -> bool:
        """Whether the device computes on its own."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Return when the device is idle."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def tensors(self, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Parameters in memory of their own."""
        return [torch.randn(n, device=self.device).to(dtype) for n in sizes]

    def device_seconds(self, call: Callable[[], object]) -> float:
        """Time that the device takes, without that of the host before it."""
        if not self.is_gpu:
            return self.host_seconds(call)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def host_seconds(self, call: Callable[[], object]) -> float:
        """Time until the call returns; the device is idle before."""
        self.wait()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def whole_seconds(self, call: Callable[[], object]) -> float:
        """Time until the device has done what was called."""

        def call_and_wait() -> None:
            call()
            self.wait()

        return self.host_seconds(call_and_wait)


class Table:
    """What was measured: printed as it comes, appended to a CSV file at the end."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        name = torch.cuda.get_device_name() if bench.is_gpu else "cpu"
        self._machine = {k: v for k, v in machine().items() if k in COLUMNS} | {"device": name}
        self.rows: list[dict[str, str]] = []
        print(f"{name}, torch {torch.__version__}")
        print(f"{'':<62} {'median ms':>10} {'GB/s':>8} {'of copy':>8}")

    def add(
        self, case: str, lines: Sequence[Line], clock: Callable[[Callable[[], object]], float]
    ) -> dict[str, float]:
        """Time the lines of a case in turn; their median seconds."""
        times: dict[str, list[float]] = {line.name: [] for line in lines}
        for _ in range(2 + self._bench.rounds):
            for line in lines:
                times[line.name].append(clock(line.call))
        taken = {name: statistics.median(values[2:]) for name, values in times.items()}
        rates = {line.name: line.num_bytes / taken[line.name] / 1e9 for line in lines}
        print(case)
        for line in lines:
            has_rate = bool(line.num_bytes)
            rate = f"{rates[line.name]:.1f}" if has_rate else ""
            share = f"{rates[line.name] / rates[COPY]:.3f}" if has_rate and COPY in rates else ""
            print(f"  {line.name:<60} {taken[line.name] * 1e3:>10.4f} {rate:>8} {share:>8}")
            values = (case, line.name, f"{taken[line.name] * 1e3:.5f}", rate, share)
            self.rows.append({**self._machine, **dict(zip(COLUMNS[5:], values, strict=True))})
        return taken


def copy_line(bench: Bench, num_bytes: int) -> Line:
    """A copy within the device: half of the bytes are read, half written."""
    source = torch.empty(num_bytes // 8, device=bench.device)
    target = torch.empty_like(source)
    return Line(COPY, lambda: target.copy_(source), num_bytes)


def rate_lines(bench: Bench, sizes: Sequence[int]) -> Iterator[Line]:
    """Updates of every kind, beside what else does the work of the first."""
    total = sum(sizes)
    yield copy_line(bench, 12 * total)
    for dtype in (torch.float32, torch.bfloat16):
        model = module_of(bench.tensors(sizes, dtype))
        of_each = torch.empty((), dtype=dtype).element_size()
        for profiles in (1, 3):
            ema = ShardedEMA(model, {f"p{k}": DECAY for k in range(profiles)})
            name = f"{str(dtype).removeprefix('torch.')}, K = {profiles}: update()"
            yield Line(name, ema.update, (of_each + 8 * profiles) * total)
    model = module_of(bench.tensors(sizes, torch.float32))
    live = [p.detach() for p in model.parameters()]
    shadow = [t.clone() for t in live]

    def two_passes() -> None:
        torch._foreach_mul_(shadow, DECAY)
        torch._foreach_add_(shadow, live, alpha=1 - DECAY)

    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    lerp = partial(torch._foreach_lerp_, shadow, live, 1 - DECAY)
    yield Line("float32: bare torch._foreach_lerp_", lerp, 12 * total)
    yield Line("float32: mul_, then add_", two_passes, 12 * total)
    call = partial(averaged.update_parameters, model)
    yield Line("float32: AveragedModel.update_parameters()", call, 12 * total)


def host_lines(bench: Bench) -> list[Line]:
    """Calls of so little work that only the host counts."""
    model = module_of(bench.tensors((1,) * 1000, torch.float32))
    live = [p.detach() for p in model.parameters()]
    shadow = [t.clone() for t in live]
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return [
        Line("bare torch._foreach_lerp_", lambda: torch._foreach_lerp_(shadow, live, 1 - DECAY)),
        Line("update()", ShardedEMA(model, DECAY).update),
        Line("K = 3: update()", ShardedEMA(model, {"a": 0.9, "b": 0.99, "c": 0.999}).update),
        Line("AveragedModel.update_parameters()", lambda: averaged.update_parameters(model)),
    ]


class Layer(nn.Module):
    """A layer with the products of a transformer's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """As residual layers go."""
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return out


def step_lines(bench: Bench, width: int, rows: int) -> list[Line]:
    """Training steps under ``fully_shard`` on one rank, with and without an update behind them."""
    model = nn.Sequential(*(Layer(width) for _ in range(8))).to(bench.device)
    mesh = init_device_mesh(bench.device.type, (1,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ema = ShardedEMA(model, DECAY)
    x = torch.randn(rows, width, device=bench.device)

    def step() -> None:
        for _ in range(5):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def step_and_update() -> None:
        for _ in range(5):
            model(x).square().mean().backward()
            optimizer.step()
            ema.update()
            optimizer.zero_grad()

    return [Line("5 steps", step), Line("5 steps, update() after each", step_and_update)]


def run_tests(seconds: float) -> int:
    """The tests of ``tests/gpu``; 0 if they pass, -1 if there was no time."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-rs"]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=max(1.0, seconds), check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"tests/gpu: not done after {seconds:.0f} seconds")
        return -1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, append, and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu.csv")
    args = parser.parse_args(argv)
    began = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("not run on GPU: PyTorch sees no CUDA device here")
        return 1
    bench = Bench(torch.device(args.device), args.rounds)
    much = 1 if bench.is_gpu else 1000
    table = Table(bench)
    cases = {
        "4 tensors, 128 M elements": (1 << 25,) * 4,
        "3,000 tensors, 25 M elements": (8192,) * 3000,
    }
    for case, sizes in cases.items():
        lines = list(rate_lines(bench, [max(1, n // much) for n in sizes]))
        table.add(case, lines, bench.device_seconds)
    table.add("host, 1,000 tensors of one element", host_lines(bench), bench.host_seconds)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if bench.is_gpu else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        width, rows = (2048, 8192) if bench.is_gpu else (16, 8)
        case = f"fully_shard, 8 layers of width {width}, {rows} rows"
        lines = step_lines(bench, width, rows)
        plain, followed = table.add(case, lines, bench.whole_seconds).values()
        dist.destroy_process_group()
    print(f"exposed: {(followed - plain) / plain:.3%} of a step")
    append_rows(args.csv, COLUMNS, table.rows)
    if not bench.is_gpu:
        return 0
    return run_tests(SECONDS - (time.monotonic() - began))


if __name__ == "__main__":
    sys.exit(main())
