"""Bytes of tensors through a bounded buffer, where a thread checks them meanwhile."""

from __future__ import annotations

import zlib
from itertools import islice
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from sharded_ema.checkpoint.files import Directory
from sharded_ema.checkpoint.reading import stream
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.crc import crc32
from sharded_ema.checkpoint.reading.stream import stream_tensor
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Box
from tests.helpers.checkpoints import Chunking, flip, grid, ranges, rows, whole

SHAPE = (96, 80)
BLOCK = 1 << 10


def stored(path: Path, cut: Chunking) -> tuple[np.ndarray, list[Chunk]]:
    """A tensor in blocks of one file, with the CRC32 of each, as DCP has them."""
    values = np.random.default_rng(0).random(SHAPE).astype("<f4")
    chunks, data = [], b""
    for box in (box for boxes in cut(SHAPE) for box in boxes):
        slices = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        block = np.ascontiguousarray(values[slices]).tobytes()
        chunks.append(Chunk(box, "file", len(data), len(block), None, crc32=zlib.crc32(block)))
        data += block
    (path / "file").write_bytes(data)
    return values, chunks


@pytest.fixture(autouse=True)
def all_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_THREAD_BYTES", 1)


CUTS = [whole, rows(3), ranges(4), grid,
        lambda _: [[Box((0, 0), (96, 11))], [Box((0, 11), (96, 69))]]]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_blocks_are_the_tensor(cut: Chunking, tmp_path: Path) -> None:
    values, chunks = stored(tmp_path, cut)
    blocks = stream_tensor(Directory(tmp_path), "w", SHAPE, 4, chunks, BLOCK)
    assert b"".join(block.tobytes() for block in blocks) == values.tobytes()


@pytest.mark.parametrize("cut", CUTS)
def test_who_takes_no_more_than_there_is_hears_of_damage(cut: Chunking, tmp_path: Path) -> None:
    """Sums ask for as many blocks as fill the tensor, and not whether there is another one."""
    values, chunks = stored(tmp_path, cut)
    size = (tmp_path / "file").stat().st_size
    for position in (0, chunks[0].num_bytes - 1, size // 2, size - 1):
        flip(tmp_path / "file", position)
        left = values.nbytes
        with pytest.raises(CheckpointCorruptError, match=r"w: the chunk at .* is damaged"):
            for block in stream_tensor(Directory(tmp_path), "w", SHAPE, 4, chunks, BLOCK):
                left -= block.nbytes
                if not left:
                    break
        flip(tmp_path / "file", position)


def test_a_block_is_handed_on_while_it_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, chunks = stored(tmp_path, whole)
    handed_on = Event()

    def waits(data: memoryview, value: int) -> int:
        assert handed_on.wait(60)
        return crc32(data, value)

    monkeypatch.setattr(stream, "crc32", waits)
    blocks = stream_tensor(Directory(tmp_path), "w", SHAPE, 4, chunks, BLOCK)
    first = next(blocks)
    handed_on.set()
    before = first.tobytes()
    assert next(blocks).tobytes() != before and first.tobytes() == before
    assert len(list(islice(blocks, 100))) == 28


def test_the_fastest_crc_is_the_same() -> None:
    data = np.random.default_rng(1).bytes(100_003)
    assert crc32(data) == zlib.crc32(data) and crc32(data, 7) == zlib.crc32(data, 7)
