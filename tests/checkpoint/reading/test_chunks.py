"""Where blocks lie, and that they make up their tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from sharded_ema.checkpoint.files import Directory
from sharded_ema.checkpoint.names import CHUNKS_NAME
from sharded_ema.checkpoint.reading.chunks import Chunk, TableIndex, dump_chunk_table, tiles
from sharded_ema.checkpoint.reading.coverage import Coverage
from sharded_ema.checkpoint.reading.manifest import read_manifest
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.checkpoint.safetensors import read_header
from sharded_ema.errors import CheckpointCorruptError
from sharded_ema.model.layout import Box, FlatRange
from tests.helpers.checkpoints import Chunking, flip, grid, make, ranges, rows, whole

SHAPES = [(), (1,), (7,), (5, 4), (3, 4, 5), (2, 3, 2, 3), (0, 3), (3, 0)]


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"ema.t{i}": random.random(shape).astype("f4") for i, shape in enumerate(SHAPES)}


def test_columns_are_plain_safetensors() -> None:
    """Whatever integers they come in, and in whatever order their memory lies."""
    columns = {
        "tensor": np.array([0, 1], np.int32),
        "offsets": np.asfortranarray([[0, 0], [1, 2]]),
        "sizes": np.array([[1, 1], [3, 4]], np.int16),
        "file": np.array([1, 0]),
        "byte_offset": np.array([4096, 8192], ">i8"),
        "num_bytes": np.array([4, 48]),
        "digest": np.arange(32, dtype=np.uint8).reshape(2, 16),
    }
    found = load(b"".join(dump_chunk_table(columns, "uuid")))
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        assert found[name].dtype == ("u1" if name == "digest" else "i8")
        assert found[name].tolist() == column.tolist(), name


@pytest.mark.parametrize("chunking", [whole, rows(3), grid, ranges(3)])
def test_chunks_cover_their_tensors(tmp_path: Path, chunking: Chunking) -> None:
    opened = open_checkpoint(make(tmp_path / "c", arrays(), chunking))
    assert opened.verified_metadata and opened.format == "safetensors"
    for key, array in arrays().items():
        filled = np.zeros(array.shape, array.dtype)
        for chunk in opened.tensors[key].chunks():
            data = (tmp_path / "c" / chunk.file).read_bytes()
            block = data[chunk.byte_offset : chunk.byte_offset + chunk.num_bytes]
            slices = tuple(
                slice(o, o + n) for o, n in zip(chunk.box.offsets, chunk.box.sizes, strict=True)
            )
            filled[slices] = np.frombuffer(block, array.dtype).reshape(chunk.box.sizes)
        assert np.array_equal(filled, array), key


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, box=Box((1, 0), c.box.sizes)),  # beyond the end
        lambda c: replace(c, box=Box((0, 0), (1, 4))),  # a hole
        lambda c: replace(c, byte_offset=1 << 40),
        lambda c: replace(c, num_bytes=c.num_bytes - 4),
        lambda c: replace(c, num_bytes=0),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, change) -> None:
    def wrong(table: list[tuple[int, Chunk]]) -> None:
        table[-1] = (table[-1][0], change(table[-1][1]))

    tensors = {"ema.w": np.ones((5, 4), "f4")}
    with pytest.raises(CheckpointCorruptError, match=r"ema\.w"):
        open_checkpoint(make(tmp_path / "c", tensors, change=wrong)).tensors["ema.w"].chunks()


@pytest.mark.parametrize("shape", [(6,), (6, 4), (4, 6)])
def test_overlap_is_found_although_the_volume_fits(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def wrong(table: list[tuple[int, Chunk]]) -> None:
        (tensor, _), (_, second) = table[-2], table[-1]
        table[-2:] = [(tensor, second), (tensor, second)]

    path = make(tmp_path / "c", {"ema.w": np.ones(shape, "f4")}, rows(2), change=wrong)
    with pytest.raises(CheckpointCorruptError, match=r"ema\.w"):
        open_checkpoint(path).tensors["ema.w"].chunks()


def test_every_changed_byte_of_the_table_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "c", {"ema.w": np.ones((5, 4), "f4")}, rows(2))
    size = (path / CHUNKS_NAME).stat().st_size
    for position in [*range(0, size, 97), size - 1]:
        flip(path / CHUNKS_NAME, position)
        with pytest.raises(CheckpointCorruptError, match=CHUNKS_NAME):
            open_checkpoint(path)
        flip(path / CHUNKS_NAME, position)
    open_checkpoint(path)


def test_many_row_shards_are_checked_in_no_time(tmp_path: Path) -> None:
    tensors = {"ema.a": np.zeros((4096, 2), "f4"), "ema.b": np.zeros((4096,), "f4")}
    opened = open_checkpoint(make(tmp_path / "c", tensors, rows(2048)))
    assert len(opened.tensors["ema.a"].chunks()) == len(opened.tensors["ema.b"].chunks()) == 2048


def test_blocks_with_too_many_corners_are_refused() -> None:
    """Single elements of a tensor of 12 dimensions: 4096 blocks, 16 million corners."""
    boxes = [Box(index, (1,) * 12) for index in np.ndindex(*(2,) * 12)]
    with pytest.raises(CheckpointCorruptError, match="cut in 12 dimensions"):
        tiles(boxes, (2,) * 12)
    assert tiles([Box(index, (1,) * 8) for index in np.ndindex(*(2,) * 8)], (2,) * 8)


# ---------------------------------------------------------------------- all tensors at once


@pytest.mark.parametrize("chunking", [whole, rows(3), grid, ranges(3)])
def test_a_survey_finds_nothing_wrong_with_what_is_right(
    tmp_path: Path, chunking: Chunking
) -> None:
    opened = open_checkpoint(make(tmp_path / "c", arrays(), chunking))
    assert isinstance(opened.index, TableIndex)
    records, coverage = opened.index.survey()
    assert not coverage.faulty().size
    for number, record in enumerate(records):
        boxes = [chunk.box for chunk in opened.tensors[record.key].chunks()]
        assert set(np.flatnonzero(coverage.cut[number])) == {
            d for d, n in enumerate(record.shape) if any(box.sizes[d] != n for box in boxes)
        }
        assert coverage.flat[number] == all(box.flat_run(record.shape) for box in boxes)


def test_a_survey_refuses_what_is_refused_one_by_one(tmp_path: Path) -> None:
    """Rows of which one number is wrong; also those that leave the volume as it was."""
    source = make(tmp_path / "c", arrays(), grid)
    table = source / CHUNKS_NAME
    sound = table.read_bytes()
    entries, _, start = read_header(table)
    random, refused = np.random.default_rng(1), 0
    for _ in range(100):
        data = bytearray(sound)
        columns = {
            name: np.frombuffer(data, np.int64, (e.stop - e.start) // 8, start + e.start)
            for name, e in entries.items() if name != "digest"
        }  # fmt: skip
        name = random.choice(sorted(columns))
        row = random.integers(columns[name].size)
        other = columns[name][random.integers(columns[name].size)]
        columns[name][row] = random.choice([other, columns[name][row] + random.integers(-2, 3)])
        table.write_bytes(data)
        directory = Directory(source)
        opened = Checkpoint(directory, index := TableIndex(directory, read_manifest(directory)))
        wrong = set()
        for key, tensor in opened.tensors.items():
            try:
                tensor.chunks()
            except CheckpointCorruptError:
                wrong.add(key)
        records, coverage = index.survey()
        assert {records[number].key for number in coverage.faulty()} == wrong, (name, row)
        refused += bool(wrong)
    assert refused > 30


def test_a_survey_of_blocks_that_tile_by_volume_only() -> None:
    """Against the comparison of corners: boxes of a tensor, one of them replaced by another."""
    random = np.random.default_rng(2)
    outcomes = set()
    for _ in range(300):
        shape = tuple(random.integers(1, 5, size=random.integers(1, 4)).tolist())
        boxes = [box for _, box in FlatRange(0, int(np.prod(shape))).boxes(shape)]
        boxes = [box for of_rank in grid(shape) for box in of_rank if box.numel] or boxes
        if random.random() < 0.7:
            boxes[random.integers(len(boxes))] = boxes[random.integers(len(boxes))]
        coverage = Coverage([shape], ["F32"], len(shape))
        for half in (boxes[::2], boxes[1::2]):  # in any order, in batches
            offsets, sizes = (
                np.array([getattr(box, name) for box in half], np.int64).reshape(-1, len(shape))
                for name in ("offsets", "sizes")
            )
            coverage.add(np.zeros(len(half), np.int64), offsets, sizes)
        assert (coverage.faulty().size == 0) == tiles(boxes, shape), boxes
        outcomes.add(tiles(boxes, shape))
    assert outcomes == {True, False}
