"""Reads stored bytes in bounded blocks and checks them as they pass."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import xxhash

from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.errors import CheckpointCorruptError

BLOCK_BYTES = 1 << 22


class ChunkCheck:
    """The running checksum of one chunk.

    Args:
        chunk: what its bytes should be.
        key: of the tensor, for the message.
    """

    def __init__(self, chunk: Chunk, key: str) -> None:
        self._chunk, self._key = chunk, key
        self._crc = 0
        self._xxh = xxhash.xxh3_128() if chunk.digest is not None else None

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        if self._xxh is not None:
            self._xxh.update(data)
        elif self._chunk.crc32 is not None:
            self._crc = zlib.crc32(data, self._crc)

    def finish(self) -> None:
        """All bytes have passed.

        Raises:
            CheckpointCorruptError: they are not those that were written.
        """
        c = self._chunk
        wrong = self._xxh is not None and self._xxh.digest() != c.digest
        if wrong or (c.crc32 is not None and self._crc != c.crc32):
            raise CheckpointCorruptError(
                f"{self._key}: the bytes {c.byte_offset} to {c.byte_offset + c.num_bytes} of "
                f"{c.file} are not those that were written (checksum mismatch)"
            )


def read_exactly(descriptor: int, into: memoryview, position: int, where: str) -> None:
    """Fill a buffer from a file.

    Raises:
        CheckpointCorruptError: the file ends before.
    """
    while into.nbytes:
        count = os.preadv(descriptor, [into], position)
        if not count:
            raise CheckpointCorruptError(f"{where} ends at byte {position}, data is missing")
        into, position = into[count:], position + count


def blocks(path: Path, chunk: Chunk) -> Iterator[memoryview]:
    """The bytes of a chunk through one reused buffer."""
    buffer = memoryview(bytearray(min(BLOCK_BYTES, chunk.num_bytes)))
    with open(path / chunk.file, "rb") as file:
        for start in range(0, chunk.num_bytes, BLOCK_BYTES):
            block = buffer[: min(BLOCK_BYTES, chunk.num_bytes - start)]
            read_exactly(file.fileno(), block, chunk.byte_offset + start, str(path / chunk.file))
            yield block


def verify_chunk(path: Path, chunk: Chunk, key: str) -> None:
    """Read a chunk and check it.

    Raises:
        CheckpointCorruptError: its bytes are not those that were written.
    """
    check = ChunkCheck(chunk, key)
    for block in blocks(path, chunk):
        check.update(block)
    check.finish()
