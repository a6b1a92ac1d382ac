"""A step with a teacher: the average as a module, against a second model that is kept by hand.

``python launch/bench/teacher.py``. Two CPU ranks train a student under ``fully_shard`` to agree
with a teacher that is its average. The teacher is one of three:

* ``ema.module()``: its shards are those of the average, which an attached optimizer moves;
* ``second module, own loop``: a second ``fully_shard`` module, whose shards a loop moves after each
  step, tensor by tensor, as most programs do by hand;
* ``second module, gathered``: the same, moved by gathering every parameter of both and sharding the
  result again, as programs do that know no shards.

The three take turns in one process; a step is divided by that of the first in the same round, and
the median of these ratios is told. Bytes are those of the storages behind all shards of student,
teacher and average on one rank, padding included. The peak of resident memory is of a process that
trains with this teacher alone, less that of one without a teacher. The times of two processes on
one machine say what is saved there, and not what a cluster would.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.spawn import spawn

from measure import ROOT, append_rows, machine, nothing
from sharded_ema import ShardedEMA
from sharded_ema.errors import EMAWarning

DECAY, RANKS = 0.999, 2
COLUMNS = (
    *("date", "git sha", "torch", "python", "cpu"),
    *("case", "teacher", "bytes_per_rank", "peak_rss_mib", "median_ms", "ratio_to_ours"),
)


@dataclass(frozen=True)
class Size:
    """Of the model and of a batch on each rank."""

    width: int
    layers: int
    batch: int

    @property
    def case(self) -> str:
        numel = self.layers * (8 * self.width * self.width + 5 * self.width)
        return f"{numel:,} parameters, {self.batch} rows on each of {RANKS} ranks"


class Layer(nn.Module):
    """As in a transformer, without attention; 8 width^2 + 5 width parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def network(size: Size) -> nn.Module:
    """The same on every call, sharded layer by layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(size.width) for _ in range(size.layers)))
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Trained:
    """A student, its optimizer, and one of the teachers.

    Attributes:
        tensors: all shards of weights and averages on this rank.
        end: called after the last step.
    """

    def __init__(self, size: Size, teacher: str) -> None:
        self._student = network(size)
        self._optimizer = torch.optim.SGD(self._student.parameters(), lr=1e-3)
        self._teacher: nn.Module | None = None
        self._move: Callable[[], None] | None = None
        self._batch = (size.batch, size.width)
        self.end: Callable[[], None] = nothing
        kept: list[Tensor] = []
        if teacher == OURS:
            ema = ShardedEMA(self._student, DECAY)
            ema.attach(self._optimizer)
            self._teacher, self.end = ema.module(), ema.close
            kept = [value for name, value in ema.state_dict().items() if name != "_meta"]
        elif teacher != NONE:
            self._teacher = network(size).requires_grad_(False)
            self._move = self._by_a_loop if teacher == LOOP else self._gathered
        second = self._teacher.parameters() if self._teacher is not None else ()
        self.tensors = [*self._student.parameters(), *second, *kept]

    def step(self) -> None:
        x = torch.randn(self._batch)
        wanted = x
        if self._teacher is not None:
            with torch.no_grad():
                wanted = self._teacher(x)
        (self._student(x) - wanted).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._move is not None:
            self._move()

    def _pairs(self) -> Iterable[tuple[DTensor, DTensor]]:
        assert self._teacher is not None
        pairs = zip(self._teacher.parameters(), self._student.parameters(), strict=True)
        for average, live in pairs:
            assert isinstance(average, DTensor) and isinstance(live, DTensor)
            yield average, live

    @torch.no_grad()
    def _by_a_loop(self) -> None:
        for average, live in self._pairs():
            average.to_local().lerp_(live.to_local(), 1 - DECAY)

    @torch.no_grad()
    def _gathered(self) -> None:
        for average, live in self._pairs():
            whole = average.full_tensor().lerp_(live.full_tensor(), 1 - DECAY)
            again = distribute_tensor(
                whole, average.device_mesh, average.placements, src_data_rank=None
            )
            average.to_local().copy_(again.to_local())


OURS, LOOP, GATHERED = "ema.module()", "second module, own loop", "second module, gathered"
NONE = "no teacher"
TEACHERS = (OURS, LOOP, GATHERED, NONE)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of their local parts, each counted once."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", EMAWarning)  # of so few steps
    meeting = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)


def _weigh(rank: int, folder: str, size: Size, teacher: str) -> None:
    """On one rank: bytes of weights, and the peak of all resident memory in KiB."""
    _join(rank, folder)
    trained = Trained(size, teacher)
    for _ in range(3):
        trained.step()
    found = torch.tensor(
        [num_bytes(trained.tensors), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    )
    dist.all_reduce(found, dist.ReduceOp.MAX)
    trained.end()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def _time(rank: int, folder: str, size: Size, rounds: int) -> None:
    """On one rank: seconds of a step of each teacher in each round; all ranks begin together."""
    _join(rank, folder)
    trained = [Trained(size, teacher) for teacher in TEACHERS]
    times = torch.zeros(1 + rounds, len(trained), dtype=torch.float64)
    for index in range(1 + rounds):
        for at, each in enumerate(trained):
            dist.barrier()
            start = time.perf_counter()
            each.step()
            dist.barrier()
            times[index, at] = time.perf_counter() - start
    for each in trained:
        each.end()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(times[1:].tolist()))
    dist.barrier()
    dist.destroy_process_group()


def on_all_ranks(what: Callable[..., None], *arguments: object) -> Any:
    """What rank 0 has found."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(what, (folder, *arguments), RANKS)
        return json.loads(Path(folder, "found.json").read_text())


def measure(size: Size, rounds: int) -> list[dict[str, str]]:
    """A row for each teacher, printed, too."""
    weights = {t: on_all_ranks(_weigh, size, t) for t in TEACHERS}
    times = torch.tensor(on_all_ranks(_time, size, rounds), dtype=torch.float64)
    print(f"\n{size.case}")
    print(f"  {'':<24}  {'bytes a rank':>14}  {'+ peak MiB':>10}  {'ms':>8}  {'/ ours':>6}")
    rows = []
    for at, teacher in enumerate(TEACHERS):
        bytes_held, peak = weights[teacher]
        above = (peak - weights[NONE][1]) / 1024
        median = statistics.median(times[:, at].tolist()) * 1e3
        ratio = statistics.median((times[:, at] / times[:, TEACHERS.index(OURS)]).tolist())
        print(f"  {teacher:<24}  {bytes_held:>14,}  {above:>10.1f}  {median:>8.2f}  {ratio:>6.3f}")
        rows.append(
            {
                **machine(),
                "case": size.case,
                "teacher": teacher,
                "bytes_per_rank": str(bytes_held),
                "peak_rss_mib": f"{above:.1f}",
                "median_ms": f"{median:.3f}",
                "ratio_to_ours": f"{ratio:.3f}",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append to the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--width", type=int, default=513, help="of the model (default: odd, 513)")
    parser.add_argument("--layers", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="rows a rank (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument(
        "--csv",
        type=Path,
        default=ROOT / "docs" / "benchmarks" / "teacher.csv",
        help="table to append to (default: docs/benchmarks/teacher.csv)",
    )
    args = parser.parse_args(argv)
    rows = measure(Size(args.width, args.layers, args.batch), args.rounds)
    append_rows(args.csv, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
