"""What an update of the average costs, as ratios to its peers and to a stream of the same bytes.

``python launch/bench/update.py``. All rows of a case are timed in turn in one process. ``limit`` is
an in-place ``add_`` over one flat buffer that moves as many bytes; ``baseline`` is the best other
way to do the same work, named at the end of each line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from measure import ROOT, Report, Row, medians, nothing
from peers import PEERS
from sharded_ema import Constant, ShardedEMA
from sharded_ema.averaging.average import Average  # timed without hooks and checks around it
from sharded_ema.model.memory import allocate

DECAY = 0.999
# Elements of ten tensors, from a matrix down to a bias; a hundred times over 21 M in 1,000 tensors.
MIXTURE = (131072, 32768, 32768, 8192, 4096, 512, 128, 128, 64, 64)
SIZES = {
    "small: 1,000 tensors, 0.44 M elements": (440,) * 1000,
    "mixed: 1,000 tensors, 21 M elements": MIXTURE * 100,
    "big: 4 tensors, 20 M elements": (5_000_000,) * 4,
}
HOST = "host: 1,000 tensors of one element"


@dataclass(frozen=True)
class Bench:
    """The device of a case, and how much is measured."""

    device: torch.device
    rounds: int

    @property
    def wait(self) -> Callable[[], object]:
        """Waits until the device is idle."""
        return torch.cuda.synchronize if self.device.type == "cuda" else nothing

    def tensors(self, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Parameters in memory of their own, as an allocator would give them."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(n, generator=generator).to(self.device, dtype) for n in sizes]

    def average(self, live: Sequence[Tensor], *, guard: bool, profiles: int = 1) -> Average:
        """The library's average of ``live``."""
        average = Average(
            {f"p{k}": Constant(DECAY) for k in range(profiles)},
            live,
            [f"t{i}" for i in range(len(live))],
            nonfinite="skip" if guard else "allow",
        )
        average.start()
        return average

    def stream(self, num_bytes: int, *, into_shadow: bool = False) -> Callable[[], object]:
        """An in-place pass that reads two thirds of ``num_bytes`` and writes one third.

        Args:
            into_shadow: it writes to memory as a shadow has it: on a CPU, in large pages.
        """
        numel = num_bytes // 12
        target = torch.empty(numel, device=self.device)
        if into_shadow:
            target = allocate(numel, torch.float32, self.device, pinned=False)
        target.zero_()
        source = torch.ones(numel, device=self.device)
        return lambda: target.add_(source, alpha=1 - DECAY)


def advance(average: Average, live: Sequence[Tensor]) -> Callable[[], object]:
    """One update of every profile."""
    return lambda: average.advance(live)


def own_average(live: Sequence[Tensor]) -> list[Tensor]:
    """Averages of tensors as others keep them, and as a loop of one's own does."""
    return [tensor.float().clone() for tensor in live]


def float32_rows(bench: Bench, sizes: Sequence[int]) -> list[Row]:
    """fp32 parameters: 12 bytes are moved per element, 8 more for each further average."""
    live, total = bench.tensors(sizes, torch.float32), sum(sizes)
    plain, views = bench.average(live, guard=False), own_average(live)
    swa = get_ema_multi_avg_fn(DECAY)
    foreach, limit = "torch._foreach_lerp_", "stream of the same bytes"
    one, limit_of_3 = "update, guard off", "stream of the bytes of K=3"
    return [
        Row(foreach, lambda: torch._foreach_lerp_(views, live, 1 - DECAY), None, limit),
        Row(limit, bench.stream(12 * total)),
        Row(f"{limit} into a shadow", bench.stream(12 * total, into_shadow=True), None, limit),
        Row(limit_of_3, bench.stream(28 * total)),
        Row(one, advance(plain, live), foreach, limit),
        Row("update, guard on", advance(bench.average(live, guard=True), live), foreach, limit),
        Row("swa_utils get_ema_multi_avg_fn", lambda: swa(views, live, 1), foreach, limit),
        Row(
            "update of K=3 averages, guard off",
            advance(bench.average(live, guard=False, profiles=3), live),
            one,
            limit_of_3,
        ),
        Row(
            "update of K=3 averages, guard on",
            advance(bench.average(live, guard=True, profiles=3), live),
            "update, guard on",
            limit_of_3,
        ),
    ]


def bfloat16_rows(bench: Bench, sizes: Sequence[int]) -> list[Row]:
    """bf16 parameters and an fp32 shadow: 10 bytes per element, 8 more for each further average."""
    live, total = bench.tensors(sizes, torch.bfloat16), sum(sizes)
    plain, views = bench.average(live, guard=False), own_average(live)

    def loop() -> None:
        for average, parameter in zip(views, live, strict=True):
            average.lerp_(parameter.float(), 1 - DECAY)

    peer, limit = "bf16: loop of e.lerp_(p.float(), w)", "bf16: stream of the same bytes"
    guarded = advance(bench.average(live, guard=True), live)
    three = advance(bench.average(live, guard=True, profiles=3), live)
    one, limit_of_3 = "bf16: update, guard on", "bf16: stream of the bytes of K=3"
    return [
        Row(peer, loop, None, limit),
        Row(limit, bench.stream(10 * total)),
        Row("bf16: update, guard off", advance(plain, live), peer, limit),
        Row(one, guarded, peer, limit),
        Row(limit_of_3, bench.stream(26 * total)),
        Row("bf16: update of K=3 averages, guard on", three, one, limit_of_3),
    ]


def module_of(tensors: Sequence[Tensor]) -> nn.Module:
    """A plain module that owns ``tensors`` as its parameters."""
    module = nn.Module()
    module.weights = nn.ParameterList([nn.Parameter(t) for t in tensors])
    return module


def end_to_end_rows(bench: Bench, sizes: Sequence[int], limit: str | None = None) -> list[Row]:
    """What a training loop calls, on a plain module, of this library and of others.

    Args:
        limit: the row that moves as many bytes, where the case has one.
    """
    model = module_of(bench.tensors(sizes, torch.float32))
    live = [parameter.detach() for parameter in model.parameters()]
    views = own_average(live)
    foreach = "call: torch._foreach_lerp_"
    rows = [Row(foreach, lambda: torch._foreach_lerp_(views, live, 1 - DECAY), None, limit)]
    for nonfinite in ("allow", "skip"):
        ema = ShardedEMA(model, DECAY, nonfinite=nonfinite)
        rows.append(Row(f'call: ShardedEMA.update(), "{nonfinite}"', ema.update, foreach, limit))
    for name, make in PEERS.items():
        if name in CALLED:
            with suppress(ImportError):  # timed where it is installed
                rows.append(Row(f"call: {CALLED[name]}", make(model).update, foreach, limit))
    return rows


#: What a training loop calls of the other libraries, all of which here keep an fp32 average.
CALLED = {
    "torch AveragedModel": "AveragedModel.update_parameters()",
    "lightning EMAWeightAveraging": "Lightning EMAWeightAveraging",
    "timm ModelEmaV3": "timm ModelEmaV3.update()",
    "diffusers EMAModel": "diffusers EMAModel.step()",
    "torch_ema": "torch_ema ExponentialMovingAverage.update()",
    "ema-pytorch EMA": "ema-pytorch EMA.update()",
}


def run_on(bench: Bench, report: Report) -> None:
    """All cases on one device."""
    for case, sizes in SIZES.items():
        rows = float32_rows(bench, sizes) + bfloat16_rows(bench, sizes)
        rows += end_to_end_rows(bench, sizes, "stream of the same bytes")
        report.add(case, rows, medians(rows, bench.rounds, wait=bench.wait))
    # So few elements that nearly all of it is the cost of the calls. On a GPU the time to the
    # return of the call: waiting before, but not after.
    rows = end_to_end_rows(bench, (1,) * 1000)
    for row in rows:
        row.call()
    rows = [replace(row, before=bench.wait) for row in rows]
    report.add(HOST, rows, medians(rows, bench.rounds, warm=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append to the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument(
        "--csv",
        type=Path,
        default=ROOT / "docs" / "benchmarks" / "update.csv",
        help="table to append to (default: docs/benchmarks/update.csv)",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    report = Report("cpu")
    run_on(Bench(torch.device("cpu"), args.rounds), report)
    report.append_to(args.csv)
    if not torch.cuda.is_available():
        print("not run on GPU: PyTorch sees no CUDA device here")
        return 0
    report = Report(torch.cuda.get_device_name())
    run_on(Bench(torch.device("cuda"), args.rounds), report)
    report.append_to(args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
