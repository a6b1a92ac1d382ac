"""Sums of checkpoints with weights, streamed: several sums in one pass over what they share.

A few elements of every input are held at a time, and fewer the more inputs and sums there are, so
that memory is bounded by :data:`BUDGET_BYTES`. What comes on top is what the checkpoints say of
themselves: names, shapes and places of their chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint import durable
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.opened import Catalog, StoredTensor
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES, Bytes, SourceFiles, stream_tensor
from sharded_ema.checkpoint.safetensors import ITEMSIZE, build_header
from sharded_ema.errors import CheckpointWriteError, EMAError
from sharded_ema.tools.casting import caster, round_once, widen
from sharded_ema.tools.contents import Average
from sharded_ema.tools.huggingface import (
    ADAPTER_STEM,
    INDEX,
    Model,
    copy_description,
    index_bytes,
)
from sharded_ema.tools.naming import Renaming
from sharded_ema.tools.plan import Output, Wanted, parse_size, plan_files, plan_outputs
from sharded_ema.tools.report import Report
from sharded_ema.tools.tally import Tally
from sharded_ema.tools.workplace import Workplace, check_space
from sharded_ema.tools.write import Files, run_jobs, verify_rest

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


def plan_model(
    catalog: Catalog,
    average: Average,
    report: Report,
    *,
    dtype: str | None,
    max_shard_size: str | int,
    model: Model | None,
) -> Files:
    """The files of a model as ``consolidate`` would write it; what does not fit is reported.

    Raises:
        ConfigError, CheckpointMismatchError: an argument is out of range, or there is no adapter.
    """
    limit = parse_size(max_shard_size)
    wanted = Wanted(
        dtype=dtype,
        tied="drop",
        adapter=None,
        rename=Renaming(()),
        include=(),
        exclude=(),
        base=None,
        model=model,
    )
    outputs = plan_outputs(catalog, average, wanted, report)
    if wanted.is_adapter:  # PEFT reads one file
        return plan_files(outputs, sum(output.num_bytes for output in outputs), ADAPTER_STEM)
    return plan_files(outputs, limit)


def publish_sums(
    plan: Plan,
    target: Path,
    headers: Mapping[str, dict[str, str]],
    *,
    inputs: Sequence[tuple[Catalog, Average]],
    model: Model | None,
    report: Report,
    jobs: int,
    progress: bool,
) -> None:
    """Write one model per row of the weights, and make all of them ``target`` by one rename.

    Products are summed in float64 and rounded once. What is copied keeps its bits, unless its dtype
    is converted. Files that are open at a time: 32 to read and one per model to write, per job.

    Args:
        headers: a folder below ``target`` for each row, ``""`` for itself, and the texts for the
            headers of its files.
        inputs: checkpoints to check, but for the tensors that are summed, which are checked anyway.
        model: whose description goes beside the weights.
        report: takes the facts.
        jobs: files of a model written at a time.

    Raises:
        CheckpointCorruptError: an input is damaged.
        CheckpointWriteError: the target could not be written.
    """
    check_space(target, plan.num_bytes)
    try:
        # What a killed call has left is removed and not taken over.
        with Workplace(target, None) as place:
            for catalog, average in inputs:
                verify_rest(catalog, average)
            folders = [place.model / name for name in headers]
            for folder in folders:
                folder.mkdir(exist_ok=True)
            tally = _write_sums(
                plan, folders, list(headers.values()), report.action, jobs, progress
            )
            for folder in folders:
                if len(plan.files) > 1:
                    durable.write_durably(folder / INDEX, index_bytes(plan.files))
                if model is not None:
                    copy_description(model, folder)
                durable.fsync(folder)
            place.publish()
    except EMAError:
        raise
    except OSError as error:
        raise CheckpointWriteError(f"{target} could not be written: {error}") from error
    report.notes += tally.notes()
    report.facts |= {
        "tensors": len(plan.sources),
        "bytes": plan.num_bytes,
        "files": len(plan.files) * len(folders),
    }


def _write_sums(
    plan: Plan,
    folders: Sequence[Path],
    headers: Sequence[dict[str, str]],
    what: str,
    jobs: int,
    progress: bool,
) -> Tally:
    """All files."""
    tasks = [
        partial(
            _write_group,
            plan,
            group,
            [folder / name for folder in folders],
            headers,
            BUDGET_BYTES // jobs,
        )
        for name, group in plan.files
    ]
    total = Tally()
    for tally in run_jobs(tasks, total=plan.num_bytes, what=what, jobs=jobs, progress=progress):
        total.add(tally)
    return total


def _write_group(
    plan: Plan,
    group: Sequence[Output],
    paths: Sequence[Path],
    headers: Sequence[dict[str, str]],
    budget: int,
    advance: Callable[[int], None],
) -> Tally:
    """One file of every sum."""
    tally = Tally()
    described = [(o.name, o.dtype, o.source.shape) for o in group]
    with ExitStack() as stack:
        files = stack.enter_context(SourceFiles(None))
        writes = []
        for path, header in zip(paths, headers, strict=True):
            head = build_header(described, header)[0]
            size = len(head) + sum(output.num_bytes for output in group)
            writes.append(stack.enter_context(durable.new_file(path, size)))
            writes[-1](memoryview(head))
        for output in group:
            sources = plan.sources[output.name]
            chunks = [_placed(*source) for source in sources]
            for each in chunks:
                tally.see_chunks(each)
            if len(sources) == 1:
                blocks = _copies(files, output, sources[0], chunks[0], len(paths), tally)
            else:
                blocks = _sums(files, output, sources, chunks, plan.weights, budget, tally)
            for block in blocks:
                for write, data in zip(writes, block, strict=True):
                    write(data.data.cast("B"))
                    advance(data.nbytes)
    return tally


def _placed(catalog: Catalog, tensor: StoredTensor) -> list[Chunk]:
    """The chunks of a tensor, with the whole locations of their files."""
    chunks = catalog.chunks(tensor.key)
    return [replace(chunk, file=str(catalog.path / chunk.file)) for chunk in chunks]


def _copies(
    files: SourceFiles,
    output: Output,
    source: Source,
    chunks: Sequence[Chunk],
    count: int,
    tally: Tally,
) -> Iterator[list[Bytes]]:
    tensor = source[1]
    cast = caster(tensor.dtype, output.dtype)
    itemsize = ITEMSIZE[tensor.dtype]
    for block in stream_tensor(files, tensor.key, tensor.shape, itemsize, chunks):
        data = block
        if cast is not None:
            data = cast(block)
            tally.see_cast(block, tensor.dtype, data, output.dtype)
        yield [data] * count


def _sums(
    files: SourceFiles,
    output: Output,
    sources: Sequence[Source],
    chunks: Sequence[Sequence[Chunk]],
    weights: NDArray[np.float64],
    budget: int,
    tally: Tally,
) -> Iterator[list[Bytes]]:
    """The sums of one tensor, a few elements at a time."""
    itemsizes = [ITEMSIZE[tensor.dtype] for _, tensor in sources]
    # An input may be held twice: as it lies in its chunks, and in order.
    taken = 2 * sum(itemsizes) + len(weights) * _FLOAT64 + _SCRATCH
    length = max(1, min(budget // taken, BLOCK_BYTES // max(itemsizes)))
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
        rounded = [round_once(part[:count], output.dtype) for part in sums]
        for data, part in zip(rounded, sums, strict=True):
            tally.see_cast(part[:count].view("u1"), "F64", data, output.dtype)
        yield rounded


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
