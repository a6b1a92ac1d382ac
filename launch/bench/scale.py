"""What the metadata of a checkpoint costs at a thousand ranks and a trillion parameters.

``python launch/bench/scale.py``. The tables of three models are made up as FSDP2 would cut them,
and the part of the rank that commits is played with what a rank of each sends: the names, places
and digests are those of a real save, only the files of the ranks have no data (they are as long,
and hold nothing). What comes out is a checkpoint, which is then inspected, planned for and chosen
from as a load does.

Figures are CPU seconds and the growth of the process at its peak, each in a process of its own: on
a shared machine time on the clock means nothing. Building what the ranks send is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint import Metadata, SavePlan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.distributed_c10d import _object_to_tensor, _tensor_to_object

from measure import ROOT, append_rows, machine
from sharded_ema import ShardedEMA, consolidate
from sharded_ema.checkpoint.names import META_KEY, shard_name
from sharded_ema.checkpoint.reading.chunks import DIGEST_BYTES
from sharded_ema.checkpoint.reading.manifest import FileRecord
from sharded_ema.checkpoint.reading.selection import select
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.checkpoint.safetensors import build_header
from sharded_ema.checkpoint.writing.commit import meta_of
from sharded_ema.checkpoint.writing.planning import ColumnPlanner, Plan
from sharded_ema.checkpoint.writing.rows import Rows
from sharded_ema.checkpoint.writing.writer import SafetensorsStorageWriter, WrittenShard
from sharded_ema.model.layout import Box, Shape
from sharded_ema.tools.inspection import inspect

T = TypeVar("T")
SAVES = ("first save", "second save")
COLUMNS = (
    *("date", "git sha", "torch", "python", "cpu"),
    *("model", "ranks", "tensors", "chunks", "what", "cpu_seconds", "megabytes"),
)


@dataclass(frozen=True)
class Model:
    """A model by its tensors, and how it is cut.

    Attributes:
        ranks: that it is sharded over, in rows.
        experts_over: ranks that each expert is sharded over; the others have other experts.
        layers, width, hidden: of the transformer.
        vocabulary: rows of its embeddings.
        kv: rows of the key and value projections.
        experts: in a layer; 0 for a dense model.
    """

    ranks: int
    layers: int
    width: int
    hidden: int
    vocabulary: int
    kv: int
    experts: int = 0
    experts_over: int = 1

    def tensors(self) -> Iterator[tuple[str, Shape, range]]:
        """Name, shape, and the ranks that it is sharded over."""
        everybody = range(self.ranks)
        width, hidden = self.width, self.hidden
        yield "model.embed_tokens.weight", (self.vocabulary, width), everybody
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            for part, rows in (("q", width), ("k", self.kv), ("v", self.kv), ("o", width)):
                yield f"{name}.self_attn.{part}_proj.weight", (rows, width), everybody
            if self.experts:
                yield f"{name}.mlp.gate.weight", (self.experts, width), everybody
            groups = self.ranks // self.experts_over
            for expert in range(max(1, self.experts)):
                start = expert % groups * self.experts_over if self.experts else 0
                holders = range(start, start + self.experts_over) if self.experts else everybody
                inner = f"{name}.mlp.experts.{expert}" if self.experts else f"{name}.mlp"
                for part, shape in (
                    ("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden)),
                ):  # fmt: skip
                    yield f"{inner}.{part}_proj.weight", shape, holders
            yield f"{name}.input_layernorm.weight", (width,), everybody
            yield f"{name}.post_attention_layernorm.weight", (width,), everybody
        yield "model.norm.weight", (width,), everybody
        yield "lm_head.weight", (self.vocabulary, width), everybody


MODELS = {
    "70 B": Model(512, 80, 8192, 28672, 128256, 1024),
    "405 B": Model(1024, 126, 16384, 53248, 128256, 1024),
    "1 T MoE": Model(1024, 52, 7168, 2304, 163840, 7168, experts=384, experts_over=64),
}


def rows_of(model: Model, meta_bytes: int) -> list[Rows]:
    """What each rank describes of the fp32 average; the first one has its description as well."""
    held: list[list[tuple[str, Shape, int, int]]] = [[] for _ in range(model.ranks)]
    for name, shape, holders in model.tensors():
        step = -(-shape[0] // len(holders))
        for start, rank in zip(range(0, shape[0], step), holders, strict=False):
            held[rank].append((f"ema.{name}", shape, start, min(step, shape[0] - start)))
    held[0].append((META_KEY, (meta_bytes,), 0, meta_bytes))  # narrow elements come last
    found = []
    for blocks in held:
        offsets = np.array([[start, 0] for _, _, start, _ in blocks], np.int64)
        sizes = np.array([[size, *shape[1:], 1][:2] for _, shape, _, size in blocks], np.int64)
        found.append(
            Rows(
                [key for key, _, _, _ in blocks],
                [shape for _, shape, _, _ in blocks],
                ["U8" if key == META_KEY else "F32" for key, _, _, _ in blocks],
                np.arange(len(blocks), dtype=np.int64),
                offsets,
                sizes,
            )
        )
    return found


# ---------------------------------------------------------------------- one measurement


class Meter:
    """CPU seconds of blocks of a process, and by how much it grew at its peak since the first."""

    seconds = 0.0

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        self._before = self._status("VmRSS")

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    def __enter__(self) -> Meter:
        self._started = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._started

    @property
    def megabytes(self) -> float:
        """Of the growth."""
        return (self._status("VmHWM") - self._before) / 1e6


def _answer(pipe: Connection, function: Callable[..., Any], args: Sequence[Any]) -> None:
    pipe.send(function(*args))


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, function, args))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


Figures = dict[str, tuple[float, float]]


def pack_ranks(model: Model) -> tuple[dict[str, int], list[bytes]]:
    """How many tensors and chunks there are, and what each rank sends to plan with."""
    ranks = rows_of(model, len(_meta()))
    keys = {key for rows in ranks for key in rows.keys}
    counts = {"tensors": len(keys), "chunks": sum(len(rows.tensor) for rows in ranks)}
    return counts, [rows.pack() for rows in ranks]


def _meta() -> Any:
    """The description of an average, as its tensor holds it."""
    return ShardedEMA(torch.nn.Linear(1, 1), 0.999).state_dict()[META_KEY].numpy()


def write_shard(
    rows: Rows, rank: int, directory: Path, uuid: str, meta: bytes
) -> tuple[FileRecord, dict[str, bytes]]:
    """The file of a rank: its header, and as many bytes as there would be."""
    sizes = [
        tuple(size[: len(rows.shapes[i])])
        for i, size in zip(rows.tensor.tolist(), rows.sizes.tolist(), strict=True)
    ]
    described = [
        (f"{rows.keys[i]}@0", rows.dtypes[i], size)
        for i, size in zip(rows.tensor.tolist(), sizes, strict=True)
    ]
    header, entries = build_header(described, {"format": "pt", "uuid": uuid})
    total = len(header) + entries[-1].stop
    name = shard_name(rank, "")
    with (directory / name).open("wb") as file:
        file.write(header)
        file.truncate(total)
        if META_KEY in rows.keys:
            file.seek(len(header) + entries[-1].start)
            file.write(meta)
    record = FileRecord(name, total, "0" * 32, len(header), xxhash.xxh3_128_hexdigest(header))
    return record, ({META_KEY: meta} if META_KEY in rows.keys else {})


def sent(value: T) -> T:
    """What comes of an object that one rank sends to another, as DCP sends it."""
    data, size = _object_to_tensor(value, torch.device("cpu"), None)
    received: T = _tensor_to_object(data, size, None)
    return received


def commit(packed: list[bytes], folder: Path) -> Figures:
    """The part of the rank that commits, in two saves; checkpoints are left in ``folder``."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meta, random = meta_of(_meta()), np.random.default_rng(0)
    figures: Figures = {}
    kept: Plan | None = None
    for save in SAVES:
        meter = Meter()
        with meter:
            described = [None] * len(packed) if kept else packed
            given = [sent(SavePlan([], planner_data=data)) for data in described]
            planner = ColumnPlanner(kept)
            writer = SafetensorsStorageWriter(folder / save)
            plans = writer.prepare_global_plan(planner.create_global_plan(given)[0])
            given = [sent(plan) for plan in plans]
            place = given[0].storage_data
            writer.write_data(SavePlan([], storage_data=place), planner)  # takes the plan over
        shards = alone(write_shards, packed, Path(place.directory), place.uuid, meta)
        answers = [
            WrittenShard(
                MetadataIndex(record.name), record.num_bytes, None, record, metas,
                random.bytes(DIGEST_BYTES * rows),
            )
            for record, metas, rows in shards
        ]  # fmt: skip
        with meter:
            writer.finish(Metadata({}), [[sent(answer)] for answer in answers])
        kept = Plan("", 1, [], planner.shared)
        figures[f"commit, {save}"] = meter.seconds, meter.megabytes
        del answers, given, planner, plans, writer
    return figures


def write_shards(
    packed: list[bytes], directory: Path, uuid: str, meta: bytes
) -> list[tuple[FileRecord, dict[str, bytes], int]]:
    """The files of all ranks, what averages in them say, and how many blocks each has."""
    found = []
    for rank, data in enumerate(packed):
        rows = Rows.unpack(data)
        found.append((*write_shard(rows, rank, directory, uuid, meta), len(rows.tensor)))
    return found


def look(checkpoint: Path) -> Figures:
    """``inspect``."""
    meter = Meter()
    with meter:
        report = inspect(checkpoint)
    assert report.ok
    return {"inspect": (meter.seconds, meter.megabytes)}


def choose(checkpoint: Path, packed: bytes) -> Figures:
    """What a rank reads and chooses from before it loads its pieces; as one that is alone."""
    rows = Rows.unpack(packed)
    wanted = []
    columns = (column.tolist() for column in (rows.tensor, rows.offsets, rows.sizes))
    for i, offsets, sizes in zip(*columns, strict=True):
        dims = len(rows.shapes[i])
        wanted.append((rows.keys[i], Box(tuple(offsets[:dims]), tuple(sizes[:dims]))))
    meter = Meter()
    with meter, open_checkpoint(checkpoint, check_files=False) as opened:
        parts = select(opened, wanted)
    assert len(parts) == len(wanted)
    return {"load: metadata of a rank": (meter.seconds, meter.megabytes)}


def plan(checkpoint: Path) -> Figures:
    """``consolidate --plan``."""
    meter = Meter()
    with meter:
        report = consolidate(checkpoint, checkpoint.with_name("out"), plan=True, progress=False)
    assert report.ok
    return {"consolidate --plan": (meter.seconds, meter.megabytes)}


def measure(model: Model, folder: Path) -> tuple[dict[str, int], Figures]:
    """All figures of one model."""
    counts, packed = alone(pack_ranks, model)
    figures = alone(commit, packed, folder)
    for function in (look, plan):
        figures |= alone(function, folder / SAVES[-1])
    figures |= alone(choose, folder / SAVES[-1], packed[model.ranks // 2])
    return counts, figures


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print one table, and append to that of the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dir", type=Path, help="where to write; some GB, and sparse files of TB")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks" / "scale.csv",
        help="table to append to (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    base = {name: value for name, value in machine().items() if name in COLUMNS}
    lines: list[dict[str, str]] = []
    for name in args.models:
        model = MODELS[name]
        folder = Path(tempfile.mkdtemp(dir=args.dir))
        try:
            counts, figures = measure(model, folder)
        finally:
            shutil.rmtree(folder)
        about = {"ranks": str(model.ranks), **{key: str(n) for key, n in counts.items()}}
        print(
            f"\n{name} x {model.ranks:,}: {counts['tensors']:,} tensors, "
            f"{counts['chunks']:,} chunks"
        )
        for what, (seconds, megabytes) in figures.items():
            print(f"  {what:<24} {seconds:>8.2f} CPU s {megabytes:>8.0f} MB")
            lines.append(
                base
                | {"model": name, **about, "what": what}
                | {"cpu_seconds": f"{seconds:.3f}", "megabytes": f"{megabytes:.0f}"}
            )
    append_rows(args.output, COLUMNS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
