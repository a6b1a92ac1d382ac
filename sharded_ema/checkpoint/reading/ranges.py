"""Reading chosen bytes of many files: each file opened once, near ranges together, several at once.

What is read is handed on in the order of the files and of the bytes in them, on the thread that
asked for it; memory holds a few requests, whatever the size of what is read.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import xxhash

from sharded_ema.checkpoint.files import URL, Bytes, Directory, Location, OpenFile
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Box

#: Most bytes of one request; a single element may be longer.
REQUEST_BYTES = 1 << 23
# Bytes that are needed for each that is read in vain between two ranges.
_NEEDED_PER_VAIN = 16


@dataclass(frozen=True, slots=True)
class _Medium:
    """How to read from somewhere.

    Attributes:
        at_once: requests under way.
        near_bytes: what lies between two ranges and costs less to read than a further request.
    """

    at_once: int
    near_bytes: int


_DISK = _Medium(at_once=4, near_bytes=1 << 12)
_STORE = _Medium(at_once=24, near_bytes=1 << 16)


def _medium(location: Location) -> _Medium:
    return _STORE if isinstance(location, URL) else _DISK


class Check(Protocol):
    """A checksum that is fed the bytes it is of, in order."""

    def update(self, data: Bytes) -> None:
        """Take the next bytes; after the last ones, compare.

        Raises:
            CheckpointCorruptError: they are not what was written.
        """
        ...


class FileCheck:
    """The xxh3-128 of a file, or of its first bytes.

    Args:
        path: of the file.
        num_bytes: how many are fed.
        digest: what it must be, in hex.
    """

    def __init__(self, path: Location, num_bytes: int, digest: str) -> None:
        self._path = path
        self._left = self._num_bytes = num_bytes
        self._digest = digest
        self._xxh = xxhash.xxh3_128()

    def update(self, data: Bytes) -> None:
        """See :class:`Check`."""
        self._xxh.update(data.data)
        self._left -= data.nbytes
        if not self._left and self._xxh.hexdigest() != self._digest:
            raise CheckpointCorruptError(
                f"{self._path} is damaged: the digest of its bytes 0 to {self._num_bytes} is not "
                "the one in the manifest"
            )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes ``start`` to ``stop`` of a file that are needed together.

    Attributes:
        check: is fed with them; ``None`` for none.
        put: is given them, for the time of the call; ``None`` if they are only checked.
    """

    start: int
    stop: int
    check: Check | None = None
    put: Callable[[Bytes], None] | None = None


def blocks_of(chunk: Chunk, part: Box, itemsize: int, near_bytes: int) -> Iterator[tuple[int, Box]]:
    """Cut some elements of a chunk into blocks that lie in one piece, in the order of its bytes.

    Args:
        part: the elements, counted from the first of the chunk.
        itemsize: bytes of an element.
        near_bytes: a block may hold others if no more than so many bytes lie between two that are
            needed.

    Yields:
        Position of the block's first byte in the file, and its elements, which are in C order
        unless the chunk has strides: then it is the whole chunk.
    """
    sizes = chunk.box.sizes
    if chunk.strides is not None or not sizes:
        yield chunk.byte_offset, Box.whole(sizes)
        return
    yield from _rows(chunk.byte_offset, (), sizes, part, itemsize, near_bytes)


def _rows(
    at: int, index: tuple[int, ...], sizes: tuple[int, ...], part: Box, itemsize: int, near: int
) -> Iterator[tuple[int, Box]]:
    """The blocks among the elements that begin with ``index``, whose bytes begin at ``at``."""
    dim = len(index)
    inner = sizes[dim + 1 :]
    row_bytes = math.prod(inner) * itemsize
    first, count = part.offsets[dim], part.sizes[dim]
    last = [o + n - 1 for o, n in zip(part.offsets, part.sizes, strict=True)]
    used = _flat(last[dim + 1 :], inner) - _flat(part.offsets[dim + 1 :], inner) + 1
    between = row_bytes - used * itemsize
    if not inner or (between <= near and row_bytes <= REQUEST_BYTES):
        rows = max(1, REQUEST_BYTES // row_bytes)
        for start in range(first, first + count, rows):
            number = min(rows, first + count - start)
            lead = (*index, start, *(0 for _ in inner))
            yield at + start * row_bytes, Box(lead, (*(1 for _ in index), number, *inner))
        return
    for row in range(first, first + count):
        yield from _rows(at + row * row_bytes, (*index, row), sizes, part, itemsize, near)


def _flat(index: Sequence[int], sizes: Sequence[int]) -> int:
    """Position of an element in C order."""
    found = 0
    for i, n in zip(index, sizes, strict=True):
        found = found * n + i
    return found


def near_bytes(location: Location) -> int:
    """How far two ranges may lie apart to be read together from a disk or a store."""
    return _medium(location).near_bytes


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Request:
    file: str
    start: int
    stop: int
    stretches: list[Stretch]
    is_last: bool


def read_stretches(directory: Directory, wanted: Mapping[str, Sequence[Stretch]]) -> None:
    """Read bytes of files and hand them on.

    Args:
        wanted: by the name of the file, in the order of its bytes.

    Raises:
        CheckpointCorruptError: a file is not there or too short, or a check fails. What was handed
            on before is not taken back.
        CheckpointGoneError: the checkpoint was removed or replaced meanwhile.
    """
    medium = _medium(directory.location)
    requests = iter(
        request
        for name, stretches in wanted.items()
        for request in _requests(name, stretches, medium.near_bytes)
    )
    with directory.unless_gone(), ThreadPoolExecutor(medium.at_once, "sharded-ema-load") as pool:
        reading = _Reading(directory, pool)
        try:
            for request in requests:
                if len(reading.waiting) > medium.at_once:
                    reading.hand_on()
                reading.begin(request)
            while reading.waiting:
                reading.hand_on()
        finally:
            pool.shutdown(cancel_futures=True)
            reading.close()


class _Reading:
    """Requests under way, first come first served."""

    def __init__(self, directory: Directory, pool: ThreadPoolExecutor) -> None:
        self._directory = directory
        self._pool = pool
        self._open: dict[str, tuple[OpenFile, ExitStack]] = {}
        self._spare: list[Bytes] = []
        self.waiting: deque[tuple[_Request, Bytes, Future[None]]] = deque()

    def begin(self, request: _Request) -> None:
        """Have a thread read what is asked for."""
        if request.file not in self._open:
            stack = ExitStack()
            self._open[request.file] = (
                stack.enter_context(self._directory.open(request.file)),
                stack,
            )
        size = request.stop - request.start
        # Of the size that most have, so that it serves the next one.
        buffer = self._spare.pop() if self._spare else np.empty(REQUEST_BYTES, np.uint8)
        if size > buffer.nbytes:
            buffer = np.empty(size, np.uint8)
        file, _ = self._open[request.file]
        done = self._pool.submit(file.fetch, buffer[:size].data, request.start)
        self.waiting.append((request, buffer, done))

    def hand_on(self) -> None:
        """Wait for the first request, check its bytes and give them to whom they are for."""
        request, buffer, done = self.waiting.popleft()
        done.result()
        for stretch in request.stretches:
            data = buffer[stretch.start - request.start : stretch.stop - request.start]
            if stretch.check is not None:
                stretch.check.update(data)
            if stretch.put is not None:
                stretch.put(data)
        if buffer.nbytes == REQUEST_BYTES:
            self._spare.append(buffer)
        if request.is_last:
            self._open.pop(request.file)[1].close()

    def close(self) -> None:
        """Close the files; nobody is reading any more."""
        while self._open:
            self._open.popitem()[1][1].close()


def _requests(name: str, stretches: Sequence[Stretch], near: int) -> Iterator[_Request]:
    """Stretches of a file, those that are near to each other together."""
    limit = _joined(stretches, near)
    groups: list[list[Stretch]] = []
    stop = 0
    for stretch in stretches:
        end = max(stop, stretch.stop)
        if groups and stretch.start <= stop + limit and end - groups[-1][0].start <= REQUEST_BYTES:
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
            end = stretch.stop
        stop = end
    for number, group in enumerate(groups, start=1):
        end = max(stretch.stop for stretch in group)
        yield _Request(name, group[0].start, end, group, number == len(groups))


def _joined(stretches: Sequence[Stretch], near: int) -> int:
    """How far two stretches may lie apart to be read together, so that little is read in vain."""
    left = sum(stretch.stop - stretch.start for stretch in stretches) // _NEEDED_PER_VAIN
    limit = 0
    gaps = Counter(max(0, after.start - before.stop) for before, after in pairwise(stretches))
    for gap, count in sorted(gaps.items()):
        left -= gap * count
        if left < 0 or gap > near:
            break
        limit = gap
    return limit


def filled(stretches: Sequence[Stretch], num_bytes: int, check: Check) -> list[Stretch]:
    """Stretches of a file that is checked whole, and what lies between them.

    Args:
        stretches: in order, without checks of their own.
        num_bytes: size of the file.
        check: of all of it.

    Raises:
        CheckpointCorruptError: two of them overlap, or one lies beyond the end.
    """
    found: list[Stretch] = []
    ends = [Stretch(0, 0), *stretches, Stretch(num_bytes, num_bytes)]
    for before, stretch in pairwise(ends):
        if stretch.start < before.stop:
            raise CheckpointCorruptError(
                f"bytes {stretch.start} to {before.stop} of a file are in two chunks, or beyond "
                "its end"
            )
        for start in range(before.stop, stretch.start, REQUEST_BYTES):
            found.append(Stretch(start, min(start + REQUEST_BYTES, stretch.start), check))
        if stretch.stop > stretch.start:
            found.append(Stretch(stretch.start, stretch.stop, check, stretch.put))
    return found
