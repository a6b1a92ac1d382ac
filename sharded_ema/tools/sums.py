"""Sums of checkpoints with weights, streamed: several sums in one pass over what they share.

A few elements of every input are held at a time, and fewer the more inputs and sums there are, so
that memory is bounded by :data:`BUDGET_BYTES`. What comes on top is what the checkpoints say of
themselves: names, shapes and places of their chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharded_ema.checkpoint.reading.opened import StoredTensor
from sharded_ema.checkpoint.reading.stream import BLOCK_BYTES
from sharded_ema.checkpoint.safetensors import ITEMSIZE, PARTS
from sharded_ema.tools.assembly import Output, Reading, readings
from sharded_ema.tools.casting import Bytes, round_once, widen
from sharded_ema.tools.contents import Average
from sharded_ema.tools.huggingface import Model
from sharded_ema.tools.plan import Plan
from sharded_ema.tools.report import Report
from sharded_ema.tools.write import Tally, as_write_error, converted, write_models

#: Of blocks and sums in memory, whatever the sizes and numbers of models.
BUDGET_BYTES = 1 << 26
_FLOAT64 = 8
# Arrays of one block that a step of the sum makes, in bytes per element.
_SCRATCH = 4 * _FLOAT64


@dataclass(frozen=True)
class Sums:
    """What to sum.

    Attributes:
        sources: by the key of a tensor that the plan reads, a tensor of each input in its place;
            or the one tensor that is copied.
        weights: float64, shape ``(sums, inputs)``.
    """

    sources: Mapping[str, Sequence[StoredTensor]]
    weights: NDArray[np.float64]

    def blocks(
        self, outputs: Sequence[Output], tally: Tally, budget: int
    ) -> Iterator[Sequence[Bytes]]:
        """The blocks of outputs, a few elements at a time.

        Args:
            budget: bytes to hold.

        Raises:
            CheckpointCorruptError: a chunk is not what was written.
        """
        for reading in readings(outputs):
            if len(self.sources[reading.tensor.key]) == 1:
                for block in converted(reading, tally):
                    yield [block] * len(self.weights)
            else:
                yield from self._summed(reading, tally, budget)

    def _summed(self, reading: Reading, tally: Tally, budget: int) -> Iterator[Sequence[Bytes]]:
        # An input may be held twice: as it lies in its chunks, and in order.
        sources = self.sources[reading.tensor.key]
        itemsizes = [tensor.itemsize for tensor in sources]
        taken = 2 * sum(itemsizes) + len(self.weights) * _FLOAT64 + _SCRATCH
        length = max(1, min(budget // taken, BLOCK_BYTES // max(itemsizes)))
        inputs = [_Input(replace(reading, tensor=tensor), length, tally) for tensor in sources]
        sums = np.empty((len(self.weights), length))
        values_each = reading.tensor.itemsize // _itemsize(reading.tensor.dtype)
        for elements, dtype in reading.parts:
            total = elements * values_each
            for start in range(0, total, length):
                count = min(length, total - start)
                sums[:, :count] = 0.0
                for factors, values in zip(self.weights.T, inputs, strict=True):
                    values.add_to(sums[:, :count], factors)
                rounded = [round_once(part[:count], dtype) for part in sums]
                for data, part in zip(rounded, sums, strict=True):
                    tally.see_cast(part[:count].view("u1"), "F64", data, dtype)
                yield rounded
        for values in inputs:
            values.finish()


def _itemsize(dtype: str) -> int:
    """Bytes of a value; a complex element is two."""
    return ITEMSIZE[PARTS.get(dtype, dtype)]


class _Input:
    """The values of one tensor in order, as they are asked for.

    Args:
        length: elements to read at a time.
        tally: counts its chunks.
    """

    def __init__(self, reading: Reading, length: int, tally: Tally) -> None:
        chunks, first = reading.chunks()
        tally.see_chunks(chunks)
        self._blocks = reading.blocks(chunks, first, length * reading.tensor.itemsize)
        self._dtype = reading.tensor.dtype
        self._rest: Bytes = np.empty(0, np.uint8)

    def add_to(self, sums: NDArray[np.float64], factors: NDArray[np.float64]) -> None:
        """Add the next values, times each factor, to the rows of ``sums``."""
        itemsize = _itemsize(self._dtype)
        done = 0
        while done < sums.shape[1]:
            if not self._rest.size:
                self._rest, _ = next(self._blocks)
            stop = min(sums.shape[1], done + self._rest.size // itemsize)
            taken = (stop - done) * itemsize
            values = widen(self._rest[:taken], self._dtype)
            self._rest = self._rest[taken:]
            # NaN and infinities go where they came from.
            with np.errstate(invalid="ignore", over="ignore"):
                for row, factor in zip(sums, factors, strict=True):
                    row[done:stop] += factor * values
            done = stop

    def finish(self) -> None:
        """Read its last chunk to the end, where its checksum is compared."""
        for _ in self._blocks:
            pass


def write_sums(
    sums: Sums,
    plan: Plan,
    target: Path,
    *,
    inputs: Sequence[Average],
    like: Model | None,
    report: Report,
    jobs: int,
    progress: bool,
) -> None:
    """Write a model for each row of the weights; see :func:`~sharded_ema.tools.write.write_models`.

    Products are summed in float64 and rounded once. What is copied keeps its bits, unless its dtype
    is converted. What a killed call has left is removed and not taken over.

    Args:
        report: takes the facts.

    Raises:
        CheckpointCorruptError: an input is damaged.
        CheckpointWriteError: the target could not be written.
    """
    with as_write_error(f"{target} could not be written"):
        written = write_models(
            plan,
            target,
            lambda outputs, tally: sums.blocks(outputs, tally, BUDGET_BYTES // jobs),
            inputs=inputs,
            like=like,
            what=report.action,
            jobs=jobs,
            progress=progress,
        )
    report.notes += written.tally.notes()
    report.facts |= {
        "tensors": len(sums.sources),
        "bytes": plan.num_bytes,
        "files": len(plan.headers) * len(plan.files),
    }
