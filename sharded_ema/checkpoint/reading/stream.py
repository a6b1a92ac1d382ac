"""Reading the bytes of tensors through a bounded buffer, each chunk checked on the way.

A CRC32 takes longer than all else that is done here, so it is computed in a thread, while whoever
asked for a block is at work on it.

Memory stays at a few blocks whatever the size of a tensor. The exception is a chunk whose first
dimension is not its outermost in storage (a transposed matrix in a foreign DCP checkpoint): it is
held whole while its tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from sharded_ema.checkpoint.files import Bytes, Directory, Location, Member, open_regular
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.crc import crc32
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Shape

#: Bytes read, hashed and handed on at a time; a multiple of every item size.
BLOCK_BYTES = 1 << 22
# Chunks below it are not worth a thread.
_THREAD_BYTES = 1 << 19


class ChunkCheck:
    """The checksum of one chunk, fed in order of its bytes.

    Args:
        pool: what computes a CRC32 while the caller goes on; ``None`` for the caller's thread.
    """

    def __init__(
        self, directory: Directory, chunk: Chunk, key: str, pool: Executor | None = None
    ) -> None:
        self._pool = pool if chunk.num_bytes >= _THREAD_BYTES else None
        self._running: Future[int] | None = None
        self._directory = directory
        self._chunk = chunk
        self._key = key
        self._left = chunk.num_bytes
        self._xxh = xxhash.xxh3_128() if chunk.digest is not None else None
        self._crc = 0

    def update(self, data: Bytes) -> None:
        """Take the next bytes, which must stay as they are until :meth:`wait` or the next ones.

        Raises:
            CheckpointCorruptError: these were the last ones, and they are not what was written.
        """
        self.wait()
        self._left -= data.nbytes
        if self._xxh is not None:
            self._xxh.update(data.data)
        elif self._chunk.crc32 is not None and self._pool is not None:
            self._running = self._pool.submit(crc32, data.data, self._crc)
        elif self._chunk.crc32 is not None:
            self._crc = crc32(data.data, self._crc)
        if self._running is None and not self._left:
            self._compare()

    def wait(self) -> None:
        """Return when the bytes may change; see :meth:`update`."""
        if self._running is not None:
            self._crc, self._running = self._running.result(), None
            if not self._left:
                self._compare()

    def _compare(self) -> None:
        chunk = self._chunk
        if self._xxh is not None:
            good = self._xxh.digest() == chunk.digest
        else:
            good = chunk.crc32 in (None, self._crc)
        if not good:
            raise CheckpointCorruptError(
                f"{self._key}: the chunk at {chunk.box.offsets} of size {chunk.box.sizes} is "
                f"damaged ({self._directory.location / chunk.file}, bytes {chunk.byte_offset} to "
                f"{chunk.byte_offset + chunk.num_bytes}); restore the file from a copy"
            )


def verify_chunk(directory: Directory, chunk: Chunk, key: str) -> None:
    """Read one chunk and compare its checksum.

    Raises:
        CheckpointCorruptError: it is not what was written.
    """
    for _ in _read_run(directory, chunk, key, BLOCK_BYTES, None):
        pass


def verify_file(path: Location | Member, digest: str) -> None:
    """Compare the xxh3-128 of a whole file with its hex ``digest``.

    Raises:
        CheckpointCorruptError: it is not what was written.
    """
    if scan_file(path)[0] != digest:
        raise CheckpointCorruptError(
            f"{path} is damaged: its digest is not the one in the manifest"
        )


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start`` to ``stop`` of a file and what their checksum must be.

    Attributes:
        digest: their xxh3-128, or
        crc32: their CRC32.
        content: what they are, for messages.
    """

    start: int
    stop: int
    digest: bytes | None
    crc32: int | None
    content: Callable[[], str]


def scan_file(
    path: Location | Member, spans: Iterable[Span] = (), num_bytes: int | None = None
) -> tuple[str, list[Span]]:
    """Read a file once, from its first byte on.

    Args:
        spans: in ascending order, without overlap.
        num_bytes: how much to read; what follows is not looked at.

    Returns:
        The xxh3-128 of all that was read in hex, and the spans that are damaged or missing.

    Raises:
        CheckpointCorruptError: there is no such file, or the disk cannot read it.
    """
    whole = xxhash.xxh3_128()
    damaged: list[Span] = []
    buffer = np.empty(BLOCK_BYTES, np.uint8)
    position = 0
    running: Any = None
    with open_regular(path) as file:
        waiting = iter(spans)
        span = next(waiting, None)
        end = file.size if num_bytes is None else num_bytes
        while count := file.read_at(buffer.data[: end - position], position):
            whole.update(buffer[:count].data)
            while span is not None and span.start < position + count:
                if running is None:
                    running = _Crc32() if span.digest is None else xxhash.xxh3_128()
                part = buffer[max(0, span.start - position) : min(count, span.stop - position)]
                running.update(part.data)
                if span.stop > position + count:
                    break
                expected = span.crc32 if span.digest is None else span.digest
                if running.digest() != expected:
                    damaged.append(span)
                span, running = next(waiting, None), None
            position += count
    if span is not None:
        damaged += [span, *waiting]
    return whole.hexdigest(), damaged


class _Crc32:
    """CRC32 with the interface of a hash."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = crc32(data, self._value)

    def digest(self) -> int:
        return self._value


def stream_tensor(
    directory: Directory,
    key: str,
    shape: Shape,
    itemsize: int,
    chunks: Sequence[Chunk],
    block_bytes: int = 0,
) -> Iterator[Bytes]:
    """The bytes of a tensor in C order, block by block.

    Args:
        shape: global shape in elements.
        itemsize: bytes per element.
        chunks: of this tensor, known to fill it without overlap.
        block_bytes: read at a time, a multiple of ``itemsize``; 0 for ``BLOCK_BYTES``.

    Yields:
        Arrays of uint8, whole elements each, valid until the next one is asked for.

    Raises:
        CheckpointCorruptError: a chunk is damaged. Blocks of it may have been yielded, but never
            the last one of the tensor.
    """
    block_bytes = block_bytes or BLOCK_BYTES
    slow = any(
        c.digest is None and c.crc32 is not None and c.num_bytes >= _THREAD_BYTES for c in chunks
    )
    with ThreadPoolExecutor(1) if slow else nullcontext() as pool:
        runs = []
        for chunk in chunks:
            run = chunk.box.flat_run(shape) if chunk.strides is None else None
            if run is None:
                yield from _stream_bands(directory, key, shape, itemsize, chunks, block_bytes, pool)
                return
            runs.append((run[0], chunk))
        runs.sort(key=lambda pair: pair[0])
        for _, chunk in runs:
            ends = chunk is runs[-1][1]
            yield from _read_run(directory, chunk, key, block_bytes, pool, ends=ends)


def _read_run(
    directory: Directory,
    chunk: Chunk,
    key: str,
    block_bytes: int,
    pool: Executor | None,
    *,
    ends: bool = True,
) -> Iterator[Bytes]:
    """The bytes of a chunk.

    Args:
        pool: see :class:`ChunkCheck`.
        ends: whether nobody may ask for more than its last block.
    """
    check = ChunkCheck(directory, chunk, key, pool)
    size = min(block_bytes, chunk.num_bytes)
    # While one is checked the other one is read into.
    buffers = [np.empty(size, np.uint8) for _ in range(1 if pool is None else 2)]
    for number, start in enumerate(range(0, chunk.num_bytes, block_bytes)):
        block = buffers[number % len(buffers)][: chunk.num_bytes - start]
        directory.read_into(chunk.file, block, chunk.byte_offset + start)
        check.update(block)
        if ends and start + block.nbytes == chunk.num_bytes:
            check.wait()
        yield block
    check.wait()


def _stream_bands(
    directory: Directory,
    key: str,
    shape: Shape,
    itemsize: int,
    chunks: Sequence[Chunk],
    block_bytes: int,
    pool: Executor | None,
) -> Iterator[Bytes]:
    """Assemble bands: ranges of one dimension in which all inner dimensions are whole.

    The bands of a tensor follow each other in C order, and the part of a chunk in each band is one
    run of the chunk's bytes, so a chunk is still read from its first byte to its last.
    """
    dim = 0
    while math.prod(shape[dim + 1 :]) * itemsize > block_bytes:
        dim += 1
    row_bytes = math.prod(shape[dim + 1 :]) * itemsize
    rows = min(shape[dim], max(1, block_bytes // row_bytes))
    element = np.dtype(f"V{itemsize}")
    buffer = np.empty(rows * row_bytes, np.uint8)
    # The band's parts of all chunks are no larger than the band.
    scratch = np.empty(rows * row_bytes, np.uint8)
    pending = [
        _BandSource(directory, chunk, key, dim, itemsize, pool)
        for chunk in sorted(chunks, key=lambda c: c.box.offsets)
    ]
    total, done = math.prod(shape) * itemsize, 0
    for index in np.ndindex(*shape[:dim]):
        for start in range(0, shape[dim], rows):
            stop = min(shape[dim], start + rows)
            band = buffer[: (stop - start) * row_bytes]
            target = band.view(element).reshape(stop - start, *shape[dim + 1 :])
            used, room = [], scratch
            for source in pending:
                if source.begins_after(index, stop):
                    break
                room = room[source.copy(index, start, stop, target, room) :]
                used.append(source)
            pending = [source for source in pending if not source.done]
            done += band.nbytes
            if done < total:
                yield band
            for source in used:
                source.wait()
    yield band  # of which all is checked: nobody may ask for more


class _BandSource:
    """One chunk, read band by band."""

    def __init__(
        self,
        directory: Directory,
        chunk: Chunk,
        key: str,
        dim: int,
        itemsize: int,
        pool: Executor | None,
    ) -> None:
        self._directory = directory
        self._chunk = chunk
        self._key = key
        self._dim = dim
        self._element = np.dtype(f"V{itemsize}")
        self._check = ChunkCheck(directory, chunk, key, pool)
        self._position = chunk.byte_offset
        self._whole: NDArray[Any] | None = None
        self._last = tuple(o + n for o, n in zip(chunk.box.offsets, chunk.box.sizes, strict=True))
        self.done = False

    def begins_after(self, index: Shape, stop: int) -> bool:
        """Whether this chunk and those sorted after it lie behind the band."""
        # Chunks are sorted by their offsets, of which the first alone bounds those that follow.
        first = (*index, stop - 1)[0]
        return self._chunk.box.offsets[0] > first

    def copy(
        self, index: Shape, start: int, stop: int, target: NDArray[Any], scratch: Bytes
    ) -> int:
        """Copy what this chunk has of the band at ``index``, rows ``start`` to ``stop``.

        Returns:
            How many bytes of ``scratch`` must stay as they are until :meth:`wait`.
        """
        offsets, sizes, dim = self._chunk.box.offsets, self._chunk.box.sizes, self._dim
        inside = all(o <= i < o + n for i, o, n in zip(index, offsets, sizes, strict=False))
        first, last = max(start, offsets[dim]), min(stop, offsets[dim] + sizes[dim])
        if not inside or first >= last:
            return 0
        inner = tuple(
            slice(o, o + n) for o, n in zip(offsets[dim + 1 :], sizes[dim + 1 :], strict=True)
        )
        rows = target[(slice(first - start, last - start), *inner)]
        if self._in_band_order():
            rows[...] = self._next_rows(last - first, scratch)
        else:
            where: list[int | slice] = [i - o for i, o in zip(index, offsets, strict=False)]
            where.append(slice(first - offsets[dim], last - offsets[dim]))
            rows[...] = self._load()[tuple(where)]
        reached = (*index, last)
        self.done = reached == (*(n - 1 for n in self._last[:dim]), self._last[dim])
        return int(rows.nbytes)

    def wait(self) -> None:
        """Return when what was read is checked as far as it can be."""
        self._check.wait()

    def _in_band_order(self) -> bool:
        """Whether the rows of the chunk follow each other in its file as they do in the bands."""
        strides, sizes, dim = self._chunk.strides, self._chunk.box.sizes, self._dim
        if strides is None:
            return True
        # All dimensions down to the band's must lie outside the others, in their order.
        return all(sizes[d] == 1 or strides[d] == math.prod(sizes[d + 1 :]) for d in range(dim + 1))

    def _next_rows(self, count: int, scratch: Bytes) -> NDArray[Any]:
        sizes = (count, *self._chunk.box.sizes[self._dim + 1 :])
        data = scratch[: math.prod(sizes) * self._element.itemsize]
        self._directory.read_into(self._chunk.file, data, self._position)
        self._position += data.nbytes
        self._check.update(data)
        elements = data.view(self._element)
        if self._chunk.strides is None:
            return elements.reshape(sizes)
        return _strided(elements, sizes, self._chunk.strides[self._dim :])

    def _load(self) -> NDArray[Any]:
        if self._whole is None:
            data = np.empty(self._chunk.num_bytes, np.uint8)
            self._directory.read_into(self._chunk.file, data, self._chunk.byte_offset)
            self._check.update(data)
            self._check.wait()
            assert self._chunk.strides is not None
            elements = data.view(self._element)
            self._whole = _strided(elements, self._chunk.box.sizes, self._chunk.strides)
        return self._whole


def _strided(elements: NDArray[Any], sizes: Shape, strides: Shape) -> NDArray[Any]:
    itemsize = elements.dtype.itemsize
    return as_strided(elements, sizes, [s * itemsize for s in strides], writeable=False)
