"""Sums of checkpoints with weights, streamed: several sums in one pass over what they share.

A few elements of every input are held at a time, and fewer the more inputs and sums there are, so
that memory is bounded by :data:`BUDGET_BYTES`. What comes on top is what the checkpoints say of
themselves: names, shapes and places of their chunks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sharded_ema.checkpoint.reading.catalog import Catalog, StoredTensor
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.safetensors_file import ITEMSIZE, build_header
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES, Bytes, SourceFiles, stream_tensor
from sharded_ema.tools.casting import caster, widen
from sharded_ema.tools.planning import Files, Output, write_all

#: Of blocks and sums in memory, whatever the sizes and numbers of models.
BUDGET_BYTES = 1 << 26
_FLOAT64 = 8
# Arrays of one block that a step of the sum makes, in bytes per element.
_SCRATCH = 4 * _FLOAT64

Source = tuple[Catalog, StoredTensor]


@dataclass(frozen=True)
class Plan:
    """What to sum.

    Attributes:
        files: output files, of every sum alike.
        sources: by output name, a tensor of each input; or the one tensor that is copied.
        weights: float64, shape ``(sums, inputs)``.
    """

    files: Files
    sources: Mapping[str, Sequence[Source]]
    weights: NDArray[np.float64]

    @property
    def num_bytes(self) -> int:
        """Of tensors in all outputs."""
        return len(self.weights) * sum(o.num_bytes for _, group in self.files for o in group)


def write_sums(
    plan: Plan,
    folders: Sequence[Path],
    headers: Sequence[dict[str, str]],
    *,
    what: str,
    jobs: int,
    progress: bool,
) -> int:
    """Write one model per row of the weights.

    Products are summed in float64 and rounded once. What is copied keeps its bits, unless its dtype
    is converted. Files that are open at a time: 32 to read and one per model to write, per job.

    Args:
        folders: where to, one for each row.
        headers: texts for the headers of its files.
        what: label of the progress bar.
        jobs: files of a model written at a time.

    Returns:
        How many chunks had no checksum to compare with.

    Raises:
        CheckpointCorruptError: data of an input is damaged.
    """
    with (
        tqdm(
            total=plan.num_bytes, unit="B", unit_scale=True, desc=what, disable=not progress
        ) as bar,
        ThreadPoolExecutor(max_workers=jobs) as pool,
    ):
        budget = BUDGET_BYTES // jobs
        running = [
            pool.submit(
                _write_group,
                plan,
                group,
                [folder / name for folder in folders],
                headers,
                budget,
                bar.update,
            )
            for name, group in plan.files
        ]
        try:
            return sum(done.result() for done in running)
        finally:
            for waiting in running:
                waiting.cancel()


def _write_group(
    plan: Plan,
    group: Sequence[Output],
    paths: Sequence[Path],
    headers: Sequence[dict[str, str]],
    budget: int,
    advance: Callable[[int], Any],
) -> int:
    """One file of every sum."""
    unchecked = 0
    described = [(o.name, o.dtype, o.source.shape) for o in group]
    with ExitStack() as stack:
        # Of the file system, so that the checkpoints share the limit on open files.
        files = stack.enter_context(SourceFiles(Path("/")))
        opened = [stack.enter_context(open(path, "xb", buffering=0)) for path in paths]
        for file, header in zip(opened, headers, strict=True):
            write_all(file.fileno(), memoryview(build_header(described, header)[0]))
        for output in group:
            sources = plan.sources[output.name]
            chunks = [_absolute(*source) for source in sources]
            unchecked += sum(c.digest is None and c.crc32 is None for cs in chunks for c in cs)
            if len(sources) == 1:
                blocks = _copies(files, output, sources[0], chunks[0], len(paths))
            else:
                blocks = _sums(files, output, sources, chunks, plan.weights, budget)
            for block in blocks:
                for file, data in zip(opened, block, strict=True):
                    write_all(file.fileno(), data.data.cast("B"))
                    advance(data.nbytes)
        for file in opened:
            os.fsync(file.fileno())
    return unchecked


def _absolute(catalog: Catalog, tensor: StoredTensor) -> list[Chunk]:
    root = catalog.path.absolute()
    return [replace(chunk, file=str(root / chunk.file)) for chunk in catalog.chunks(tensor.key)]


def _copies(
    files: SourceFiles, output: Output, source: Source, chunks: Sequence[Chunk], count: int
) -> Iterator[list[Bytes]]:
    tensor = source[1]
    cast = caster(tensor.dtype, output.dtype)
    itemsize = ITEMSIZE[tensor.dtype]
    for block in stream_tensor(files, tensor.key, tensor.shape, itemsize, chunks):
        yield [block if cast is None else cast(block)] * count


def _sums(
    files: SourceFiles,
    output: Output,
    sources: Sequence[Source],
    chunks: Sequence[Sequence[Chunk]],
    weights: NDArray[np.float64],
    budget: int,
) -> Iterator[list[Bytes]]:
    """The sums of one tensor, a few elements at a time."""
    itemsizes = [ITEMSIZE[tensor.dtype] for _, tensor in sources]
    # An input may be held twice: as it lies in its chunks, and in order.
    taken = 2 * sum(itemsizes) + len(weights) * _FLOAT64 + _SCRATCH
    length = max(1, min(budget // taken, BLOCK_BYTES // max(itemsizes)))
    cast = caster("F64", output.dtype)
    inputs = [
        _Input(
            stream_tensor(files, tensor.key, tensor.shape, itemsize, chunk, length * itemsize),
            tensor.dtype,
        )
        for (_, tensor), itemsize, chunk in zip(sources, itemsizes, chunks, strict=True)
    ]
    sums = np.empty((len(weights), length))
    numel = output.source.num_bytes // ITEMSIZE[output.source.dtype]
    for start in range(0, numel, length):
        count = min(length, numel - start)
        sums[:, :count] = 0.0
        for factors, values in zip(weights.T, inputs, strict=True):
            values.add_to(sums[:, :count], factors)
        parts = [part[:count].view(np.uint8) for part in sums]
        yield parts if cast is None else [cast(part) for part in parts]


class _Input:
    """The elements of one tensor in order, as they are asked for."""

    def __init__(self, blocks: Iterator[Bytes], dtype: str) -> None:
        self._blocks = blocks
        self._dtype = dtype
        self._rest: Bytes = np.empty(0, np.uint8)

    def add_to(self, sums: NDArray[np.float64], factors: NDArray[np.float64]) -> None:
        """Add the next elements, times each factor, to the rows of ``sums``."""
        itemsize = ITEMSIZE[self._dtype]
        done = 0
        while done < sums.shape[1]:
            if not self._rest.size:
                self._rest = next(self._blocks)
            stop = min(sums.shape[1], done + self._rest.size // itemsize)
            taken = (stop - done) * itemsize
            values = widen(self._rest[:taken], self._dtype)
            self._rest = self._rest[taken:]
            # NaN and infinities go where they came from.
            with np.errstate(invalid="ignore", over="ignore"):
                for row, factor in zip(sums, factors, strict=True):
                    row[done:stop] += factor * values
            done = stop
