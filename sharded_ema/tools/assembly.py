"""What a tensor of the output is made of: stretches of stored tensors, one after the other.

Most are one stored tensor, whole. Others are a slice of one that holds many, as the experts of a
mixture, or several of them joined. All are read in C order, so a slice must be a stretch there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from sharded_ema.checkpoint.files import Bytes
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.opened import StoredTensor
from sharded_ema.checkpoint.safetensors import in_parts, num_bytes
from sharded_ema.model.layout import Shape


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements ``start`` to ``stop`` of a stored tensor, counted in C order."""

    tensor: StoredTensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Assembled:
    """A tensor as it is to be: stretches of one dtype that fill a shape in C order."""

    shape: Shape
    stretches: tuple[Stretch, ...]

    @classmethod
    def whole(cls, tensor: StoredTensor) -> Self:
        """A stored tensor as it is."""
        return cls(tensor.shape, (Stretch(tensor, 0, math.prod(tensor.shape)),))

    @property
    def tensor(self) -> StoredTensor:
        """The first that it is made of."""
        return self.stretches[0].tensor

    @property
    def dtype(self) -> str:
        """As it is stored."""
        return self.tensor.dtype

    @property
    def is_part(self) -> bool:
        """Whether it is a slice of a stored tensor."""
        first = self.stretches[0]
        return first.stop - first.start < math.prod(first.tensor.shape)


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write: its name, what it is made of, and its dtype in the file."""

    name: str
    made_of: Assembled
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of it in the file."""
        return num_bytes(self.dtype, self.made_of.shape)

    def described(self, format: str) -> tuple[str, str, Shape]:
        """Name, dtype and shape in the header of a safetensors file.

        Args:
            format: of the files in the end: in those of PyTorch there is room for every dtype.
        """
        stored = self.dtype, self.made_of.shape
        if self.dtype == "C128" and format == "safetensors":
            stored = in_parts(*stored)
        return self.name, *stored


@dataclass(frozen=True, slots=True)
class Reading:
    """A stretch of a stored tensor, read once for all outputs that follow each other in it.

    Attributes:
        parts: how many elements become which dtype, in order.
    """

    tensor: StoredTensor
    start: int
    stop: int
    parts: tuple[tuple[int, str], ...]

    def chunks(self) -> tuple[list[Chunk], int]:
        """The chunks to read, and the first element of the tensor that they yield.

        Raises:
            CheckpointCorruptError: see :meth:`.StoredTensor.chunks`.
        """
        chunks, shape = self.tensor.chunks(), self.tensor.shape
        if self.stop - self.start == math.prod(shape):
            return chunks, 0
        runs = [None if c.strides is not None else c.box.flat_run(shape) for c in chunks]
        near = [
            (run[0], chunk)
            for run, chunk in zip(runs, chunks, strict=True)
            if run is not None and run[0] < self.stop and run[1] > self.start
        ]
        # Chunks that are no stretches of the tensor are put together from all of it.
        if None in runs or not near:
            return chunks, 0
        return [chunk for _, chunk in near], min(first for first, _ in near)

    def blocks(
        self, chunks: list[Chunk], first: int, block_bytes: int = 0
    ) -> Iterator[tuple[Bytes, str]]:
        """The bytes as they are stored, each with the dtype that they become.

        All chunks are read to their ends, whose checksums are compared there.

        Args:
            chunks, first: what :meth:`chunks` has returned.
            block_bytes: see :meth:`.StoredTensor.blocks`.

        Raises:
            CheckpointCorruptError: see :meth:`.StoredTensor.blocks`.
        """
        itemsize = self.tensor.itemsize
        skipped = (self.start - first) * itemsize
        parts = [(count * itemsize, dtype) for count, dtype in self.parts if count]
        for block in self.tensor.blocks(chunks, block_bytes):
            rest = block[skipped:]
            skipped -= block.nbytes - rest.nbytes
            while rest.nbytes and parts:  # else what follows belongs to others
                left, dtype = parts[0]
                piece, rest = rest[:left], rest[left:]
                parts[:1] = [(left - piece.nbytes, dtype)] if piece.nbytes < left else []
                yield piece, dtype


def readings(outputs: Iterable[Output]) -> Iterator[Reading]:
    """How to read what outputs are made of: neighbours in a tensor together, in order."""
    parts = [(stretch, o.dtype) for o in outputs for stretch in o.made_of.stretches]
    begun = 0
    for number, (stretch, _) in enumerate(parts, start=1):
        if number < len(parts) and _goes_on(stretch, parts[number][0]):
            continue
        together = parts[begun:number]
        counts = tuple((part.stop - part.start, dtype) for part, dtype in together)
        yield Reading(stretch.tensor, together[0][0].start, stretch.stop, counts)
        begun = number


def _goes_on(before: Stretch, after: Stretch) -> bool:
    return before.tensor is after.tensor and before.stop == after.start > 0
