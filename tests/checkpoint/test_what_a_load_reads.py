"""What a load opens and fetches: the metadata once, and of the data what is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_ema import Constant, SafetensorsStorageReader, ShardedEMA, verify
from sharded_ema.checkpoint import loading
from sharded_ema.checkpoint.files import Directory, OpenFile, _LocalFile
from sharded_ema.checkpoint.reading import ranges, selection
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.reading.selection import select
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.errors import CheckpointCorruptError, EMAError, StateError
from sharded_ema.model.layout import Box
from tests.helpers import counting
from tests.helpers.checkpoints import make, rows
from tests.helpers.checkpoints import ranges as flat
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]
LAYERS, WIDTH = 8, 128
METADATA = {"manifest.json", "chunks.safetensors", ".metadata"}


class Opens:
    """Counts files that this process opens in directories, and bytes that it reads there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        open_in, read_at = Directory._open_in, _LocalFile._read_at

        def opens(directory: Directory, name: str) -> int:
            self.opened[name] += 1
            return open_in(directory, name)

        def reads(file: OpenFile, view: memoryview, position: int) -> int:
            count = read_at(file, view, position)
            self.read[Path(file.location).name] += count
            return count

        monkeypatch.setattr(Directory, "_open_in", opens)
        monkeypatch.setattr(_LocalFile, "_read_at", reads)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def sharded() -> torch.nn.Module:
    return fully_shard(model(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def needed(path: Path, profiles: int = 1) -> int:
    """Bytes of the metadata, the headers and of one average per profile."""
    total = profiles * sum(4 * p.numel() for p in model().parameters())
    for file in path.iterdir():
        if file.name in METADATA:
            total += file.stat().st_size
        elif file.name.startswith("shard-"):
            with file.open("rb") as opened:
                total += 8 + int.from_bytes(opened.read(8), "little")
    return total


# ---------------------------------------------------------------------- several ranks


def save_on_ranks(path: str, profiles: int, format: str) -> None:
    named = {f"p{i}": Constant(0.9) for i in range(profiles)}
    ema = ShardedEMA(sharded(), named)
    ema.save(path, step=1, format=format)
    ema.close()


def load_on_ranks(url: str, verify: bool) -> tuple[Counter[str], Counter[str], bool]:
    """What this rank has opened and fetched, and whether it has the values."""
    counting.register()
    ema = ShardedEMA(sharded(), {"p0": Constant(0.9)})
    with torch.no_grad():
        for view in ema._average.shadow.views["p0"]:
            view.zero_()
    assert ema.load(url, verify=verify, strict=False) == 1
    got = ema.full_state_dict(rank0_only=False)
    ema.close()
    same = all(torch.equal(got[name], p) for name, p in model().named_parameters())
    return Counter(counting.OPENED), Counter(counting.FETCHED), same


@pytest.mark.parametrize(
    "protocol, saved_by, loaded_by, profiles, format, verify",
    [
        ("counting", 2, 2, 1, "safetensors", False),
        ("counting", 2, 2, 3, "safetensors", True),
        ("counting", 2, 3, 1, "safetensors", False),
        ("objects", 3, 2, 3, "safetensors", False),
        ("counting", 2, 2, 1, "dcp", True),
    ],
)
def test_bytes_and_opens(
    worlds: Worlds,
    tmp_path: Path,
    protocol: str,
    saved_by: int,
    loaded_by: int,
    profiles: int,
    format: str,
    verify: bool,
) -> None:
    path = tmp_path / "c"
    worlds[saved_by].run(save_on_ranks, str(path), profiles, format)
    found = worlds[loaded_by].run(load_on_ranks, f"{protocol}://{path}", verify)
    assert all(same for *_, same in found)
    for opened, *_ in found:
        if protocol == "counting":  # ranges of objects are asked for one by one
            assert max(opened.values()) == 1
        assert sum(opened.values()) <= 3 * profiles * saved_by + 2
    readers = Counter(name for _, fetched, _ in found for name in fetched if name in METADATA)
    assert readers["manifest.json"] == 1 and set(readers.values()) == {1}
    # A checkpoint in DCP's format has the records of its entries, and is verified file by file.
    want = (
        needed(path) if format == "safetensors" else sum(f.stat().st_size for f in path.iterdir())
    )
    total = sum(sum(fetched.values()) for _, fetched, _ in found)
    assert total <= 1.1 * want + loaded_by * saved_by * 64


# ---------------------------------------------------------------------- one process, many files


def averages() -> dict[str, np.ndarray]:
    state = model().state_dict()
    return {f"ema.{name}": value.numpy() for name, value in state.items()}


def whole_average() -> ShardedEMA:
    torch.manual_seed(1)
    layers = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    return ShardedEMA(torch.nn.Sequential(*layers), Constant(0.999))


def values(ema: ShardedEMA) -> dict[str, torch.Tensor]:
    return {k: v for k, v in ema.state_dict().items() if k.startswith("ema.")}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("chunking", [rows(43), flat(40)])
def test_each_file_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool, chunking: Any
) -> None:
    path = make(tmp_path / "c", averages(), chunking)
    ema = whole_average()
    opens = Opens(monkeypatch)
    ema.load(path, verify=verify)
    assert set(opens.opened) == {file.name for file in path.iterdir()}
    assert set(opens.opened.values()) == {1}
    assert sum(opens.read.values()) <= 1.1 * needed(path)
    assert all(torch.equal(v, torch.from_numpy(averages()[k])) for k, v in values(ema).items())


def test_each_file_is_opened_once_by_our_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "c", averages(), rows(43))
    wanted = {k: torch.zeros(v.shape) for k, v in averages().items() if k.endswith("weight")}
    opens = Opens(monkeypatch)
    dcp.load(wanted, storage_reader=SafetensorsStorageReader(path), no_dist=True)
    assert set(opens.opened.values()) == {1}
    assert sum(opens.read.values()) <= 1.1 * needed(path)
    assert all(torch.equal(v, torch.from_numpy(averages()[k])) for k, v in wanted.items())


def test_objects_are_read_by_ranges(tmp_path: Path) -> None:
    counting.register()
    path = make(tmp_path / "c", averages(), rows(3))
    ema = whole_average()
    ema.load(f"objects://{path}")
    assert set(counting.OPENED) == {file.name for file in path.iterdir()}
    assert sum(counting.FETCHED.values()) <= 1.1 * needed(path)
    assert all(torch.equal(v, torch.from_numpy(averages()[k])) for k, v in values(ema).items())
    assert verify(f"objects://{path}").ok


@pytest.mark.parametrize("number, midway", [(0, False), (42, True)])
def test_altered_headers_are_found(tmp_path: Path, number: int, midway: bool) -> None:
    path = make(tmp_path / "c", averages(), rows(43))
    shard = sorted(path.glob("shard-*"))[number]
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    ema = whole_average()
    before = {k: v.clone() for k, v in values(ema).items()}
    with pytest.raises(CheckpointCorruptError, match=f"{shard.name}.*bytes 0 to|digest of its"):
        ema.load(path)
    if midway:  # so many files are not held open for the sake of their headers
        with pytest.raises(StateError):
            ema.update()
    else:
        assert all(torch.equal(v, before[k]) for k, v in values(ema).items())
    with pytest.raises(EMAError):
        dcp_load(path)


def dcp_load(path: Path) -> None:
    state = {"ema.0.weight": torch.zeros(WIDTH, WIDTH)}
    try:
        dcp.load(state, storage_reader=SafetensorsStorageReader(path), no_dist=True)
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def test_what_is_under_way_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "REQUEST_BYTES", 8192)
    path = make(tmp_path / "c", averages(), rows(3))
    begin, most = ranges._Reading.begin, [0]

    def begins(reading: Any, request: Any) -> None:
        begin(reading, request)
        most[0] = max(most[0], sum(buffer.nbytes for _, buffer, _ in reading.waiting))

    monkeypatch.setattr(ranges._Reading, "begin", begins)
    ema = whole_average()
    ema.load(path, verify=True)
    assert 8192 < most[0] <= (ranges._DISK.at_once + 1) * 8192
    assert all(torch.equal(v, torch.from_numpy(averages()[k])) for k, v in values(ema).items())


@pytest.mark.parametrize("gap, joined", [(0, True), (6, True), (7, False), (50, False)])
def test_little_is_read_in_vain(gap: int, joined: bool) -> None:
    wanted = [ranges.Stretch(at * (100 + gap), at * (100 + gap) + 100) for at in range(20)]
    found = list(ranges._requests("f", wanted, 40))
    assert sum(request.stop - request.start for request in found) <= 2000 * (1 + 1 / 16)
    assert len(found) == (1 if joined else 20)
    assert [s for request in found for s in request.stretches] == wanted
    assert [request.is_last for request in found] == [False] * (len(found) - 1) + [True]


class Told:
    """Two ranks of which the first has spoken before the second listens."""

    size = 2

    def __init__(self, rank: int, said: list[np.ndarray]) -> None:
        self.rank, self._said = rank, said

    def broadcast(self, data: np.ndarray, purpose: str) -> None:
        if self.rank:
            data[:] = self._said.pop(0)
        else:
            self._said.append(data.copy())


def test_another_save_than_the_first_rank_has_found(tmp_path: Path) -> None:
    path, said = tmp_path / "c", []
    make(path, averages(), rows(2))
    first = loading.Loading(path, Told(0, said))
    told = first.look()
    first.share(told, "a test")
    later = loading.Loading(path, Told(1, said))
    later.share(told, "a test")
    path.rename(tmp_path / "before")
    make(path, averages(), rows(2), uuid="f" * 32)
    with pytest.raises(loading.CheckpointGoneError):
        later.open()


# ---------------------------------------------------------------------- choosing


def test_the_chunks_of_others_are_no_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {f"ema.{i:03d}": np.full((64, 2), i, np.float32) for i in range(60)}
    checkpoint = open_checkpoint(make(tmp_path / "c", arrays, rows(32)), check_files=False)
    monkeypatch.setattr("sharded_ema.checkpoint.reading.chunks._SLAB_ROWS", 500)
    made = []

    class Counted(Chunk):
        def __init__(self, **fields: Any) -> None:
            made.append(fields)
            Chunk.__init__(self, **fields)

    monkeypatch.setattr("sharded_ema.checkpoint.reading.chunks.Chunk", Counted)
    # Of every second tensor rows 5 to 8, which are in three chunks of two rows.
    pieces = [(key, Box((5, 0), (4, 2))) for key in sorted(arrays)[::2]]
    parts = select(checkpoint, pieces)
    assert checkpoint.index.table.num_rows == 60 * 32 + 1
    assert len(made) == len(parts) == 3 * len(pieces)
    found = [(p.piece, p.chunk.box.offsets[0], p.box.offsets[0], p.box.sizes) for p in parts]
    assert found == [
        (number, start, max(start, 5), (min(start + 2, 9) - max(start, 5), 2))
        for number in range(len(pieces))
        for start in (4, 6, 8)
    ]


def test_holes_below_a_piece_are_found(tmp_path: Path) -> None:
    def shift(table: list[tuple[int, Chunk]]) -> None:
        number = next(i for i, (_, c) in enumerate(table) if c.box.offsets == (4, 0))
        tensor, chunk = table[number]
        fields = {name: getattr(chunk, name) for name in chunk.__slots__}
        table[number] = tensor, Chunk(**fields | {"box": Box((2, 0), chunk.box.sizes)})

    path = make(tmp_path / "c", {"ema.w": np.zeros((8, 2), np.float32)}, rows(4), change=shift)
    checkpoint = open_checkpoint(path, check_files=False)
    assert len(select(checkpoint, [("ema.w", Box((6, 0), (2, 2)))])) == 1
    for start in (2, 4):
        with pytest.raises(CheckpointCorruptError, match=r"ema.w leave holes or overlap"):
            select(checkpoint, [("ema.w", Box((start, 0), (2, 2)))])


@pytest.mark.parametrize("seed", range(20))
def test_parts_that_fill_a_piece(seed: int) -> None:
    random = np.random.default_rng(seed)
    pieces, parts, expected = [], [], []
    for number in range(30):
        start, size = random.integers(0, 3, 2), random.integers(1, 4, 2)
        pieces.append((start, start + size))
        count = np.zeros(size + start, np.int64)
        dim = random.integers(0, 2)
        ends = np.unique([0, *random.integers(0, size[dim] + 1, 2), size[dim]])
        mine = []
        for low, high in pairwise(ends):
            first, last = start.copy(), start + size
            first[dim], last[dim] = start[dim] + low, start[dim] + high
            mine.append((first, last))
        change = random.integers(0, 4)
        if change == 0:
            mine.pop(random.integers(0, len(mine)))
        elif change == 1:
            mine.append(mine[random.integers(0, len(mine))])
        for first, last in mine:
            count[first[0] : last[0], first[1] : last[1]] += 1
        parts += [(number, first, last) for first, last in mine]
        expected.append(bool((count[start[0] :, start[1] :] == 1).all()))
    numbers, first, last = (np.array(each) for each in zip(*random.permutation(
        np.array(parts, object)), strict=True))  # fmt: skip
    starts, stops = (np.array(each)[numbers] for each in zip(*pieces, strict=True))
    found = selection._filled(len(pieces), numbers, first, last, starts, stops)
    assert found.tolist() == expected


def boxes(seed: int) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Sizes of chunks, and some elements of each."""
    random = np.random.default_rng(seed)
    for ndim in (1, 2, 3, 4):
        for _ in range(20):
            sizes = tuple(int(n) for n in random.integers(1, 7, ndim))
            first = [int(random.integers(0, n)) for n in sizes]
            count = [int(random.integers(1, n - o + 1)) for n, o in zip(sizes, first, strict=True)]
            yield sizes, Box(tuple(first), tuple(count))


@pytest.mark.parametrize("near", [0, 24, 1 << 20])
@pytest.mark.parametrize("most", [1, 40, 1 << 20])
def test_blocks_hold_what_is_needed(monkeypatch: pytest.MonkeyPatch, near: int, most: int) -> None:
    monkeypatch.setattr(ranges, "REQUEST_BYTES", most)
    for sizes, part in boxes(most):
        data = np.arange(np.prod(sizes)).reshape(sizes)
        chunk = Chunk(Box.whole(sizes), "f", 1000, data.size * 8, None)
        read: list[int] = []
        for start, block in ranges.blocks_of(chunk, part, 8, near):
            first = (start - 1000) // 8
            flat_block = data[block.slices].reshape(-1)
            assert flat_block.tolist() == list(range(first, first + block.numel))
            assert block.numel * 8 <= most or block.numel == 1
            read += flat_block.tolist()
        wanted = set(data[part.slices].reshape(-1).tolist())
        assert wanted <= set(read) and len(read) == len(set(read)) and read == sorted(read)
        if not near:
            assert set(read) == wanted
