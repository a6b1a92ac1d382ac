"""Faults that pass other readers in silence, and random damage: none may pass here.

DCP, or the consolidation of Hugging Face shards, lets most of the faults in the table through. Each
is tried on both formats and on every way to read that looks at data.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

from sharded_ema import ShardedEMA, consolidate, verify
from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.errors import CheckpointCorruptError, EMAError, StateError
from sharded_ema.model.pieces import FlatShard
from tests.helpers.checkpoints import flip, make, meta, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Model(nn.Module):
    """All kinds of tensors: matrices of one shape, 0-d, integers, booleans, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 7), nn.Linear(6, 7)
        self.scale = nn.Parameter(torch.tensor(4.6052))
        self.frozen = nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.register_buffer("steps", torch.tensor(1 << 40))
        self.register_buffer("mask", torch.tensor([True, False, True]))


def fresh(seed: int) -> ShardedEMA:
    torch.manual_seed(seed)
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return ShardedEMA(model, 0.999)


def values(ema: ShardedEMA, *, all: bool = False) -> dict[str, Tensor]:
    """Copies of the averages, or of everything but the description, by key."""
    found = {}
    for key, value in ema.state_dict().items():
        if key.startswith("ema.") or (all and key != "_meta"):
            pieces = value.pieces if isinstance(value, FlatShard) else [(None, value.detach())]
            whole = torch.empty(value.shape, dtype=value.dtype)
            for box, tensor in pieces:
                ends = zip(box.offsets, box.sizes, strict=True) if box else ()
                whole[tuple(slice(o, o + n) for o, n in ends)] = tensor
            found[key] = whole
    return found


def save(path: Path, seed: int, format: str) -> Path:
    """Real saves, which one process makes in one file; ours in three shards as well."""
    ema = fresh(seed)
    if format == "shards":
        arrays = {key: value.numpy() for key, value in values(ema, all=True).items()}
        said = meta(num_updates=0, applied_steps=0, last_lerp_step=0, aliases={})
        make(path, arrays, rows(3), metas={"": said}, uuid=f"{seed:032x}")
    else:
        ema.save(path, step=seed, format=format)
    ema.close()
    return path


FORMATS = ["safetensors", "shards", "dcp"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saves of one model at different steps, ``<format>-<seed>``."""
    root = tmp_path_factory.mktemp("saved")
    for format in FORMATS:
        for seed in (1, 2):
            save(root / f"{format}-{seed}", seed, format)
    return root


@pytest.fixture
def pair(saved: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A copy to harm, and another save of the same model."""
    format: str = request.param
    shutil.copytree(saved / f"{format}-1", tmp_path / "c")
    return tmp_path / "c", saved / f"{format}-2"


def data_files(path: Path) -> list[Path]:
    return sorted([*path.glob("shard-*"), *path.glob("__*")])


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except EMAError:
        return True
    return False


def nothing_is_silent(path: Path, out: Path) -> None:
    """No way to read that looks at data takes the checkpoint for good."""
    assert not verify(path).ok
    ema = fresh(3)
    before = values(ema)
    with pytest.raises(EMAError):
        ema.load(path, verify=True)
    try:
        ema.update()  # refused before anything was read: the average is as it was
    except StateError:
        pass
    else:
        after = values(ema)
        assert all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(EMAError):
        consolidate(path, out, progress=False)
    assert not out.exists()


def test_the_saves_themselves_are_sound(saved: Path, tmp_path: Path) -> None:
    for format in FORMATS:
        path = saved / f"{format}-1"
        assert verify(path).ok
        ema = fresh(3)
        ema.load(path, verify=True)
        expected = values(fresh(1))
        assert all(torch.equal(value, expected[key]) for key, value in values(ema).items())
        assert consolidate(path, tmp_path / format, progress=False).ok


# ---------------------------------------------------------------------- the table


def mix(path: Path, other: Path) -> None:
    """Metadata of one save, some data of another."""
    victim = data_files(path)[0]
    shutil.copyfile(other / victim.name, victim)


def mix_data_only(path: Path, other: Path) -> None:
    """The values of a later step under this step's headers."""
    for victim in data_files(path):
        mine, theirs = bytearray(victim.read_bytes()), (other / victim.name).read_bytes()
        start = 4096 if victim.name.startswith("shard") else 704
        mine[start : start + 64] = theirs[start : start + 64]
        assert mine != victim.read_bytes()
        victim.write_bytes(mine)


def mix_manifests(path: Path, other: Path) -> None:
    """Two jobs in one directory, the manifest of the other one came last."""
    shutil.copyfile(other / "manifest.json", path / "manifest.json")


def leftover(path: Path, other: Path) -> None:
    """A shard of an earlier save on more ranks."""
    name = data_files(path)[-1].name
    shutil.copyfile(other / name, path / name.replace("0", "7", 1))


def missing(path: Path, other: Path) -> None:
    """A shard in the middle is not there."""
    files = data_files(path)
    files[len(files) // 2].unlink()


def missing_last(path: Path, other: Path) -> None:
    """The last shard is not there."""
    data_files(path)[-1].unlink()


def truncated(path: Path, other: Path) -> None:
    """A file that is too short."""
    file = data_files(path)[0]
    file.write_bytes(file.read_bytes()[:-100])


def extended(path: Path, other: Path) -> None:
    """A file that is too long."""
    with open(data_files(path)[0], "ab") as file:
        file.write(b"\0")


def flipped(path: Path, other: Path) -> None:
    """One bit of a weight."""
    chunk = open_checkpoint(path).tensors["ema.one.weight"].chunks()[0]
    flip(path / chunk.file, chunk.byte_offset + 5)


def zeroed(path: Path, other: Path) -> None:
    """Room was made and the data never came."""
    file = data_files(path)[0]
    data = bytearray(file.read_bytes())
    data[4096:4160] = bytes(64)
    file.write_bytes(data)


def swapped_files(path: Path, other: Path) -> None:
    """Two files under each other's names; of one file, the other save's."""
    files = data_files(path)
    if len(files) == 1:
        mix(path, other)
        return
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)


FAULTS = [
    mix, mix_data_only, mix_manifests, leftover, missing, missing_last, truncated, extended,
    flipped, zeroed, swapped_files,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("pair", FORMATS, indirect=True)
def test_no_fault_is_silent(pair: tuple[Path, Path], tmp_path: Path, fault: Callable) -> None:
    fault(*pair)
    nothing_is_silent(pair[0], tmp_path / "out")


def test_swapped_places_in_the_chunk_table(tmp_path: Path) -> None:
    """Where one tensor lies is said of another one of the same shape, all digests renewed."""

    def swap(table: list[tuple[int, Chunk]]) -> None:
        (a, first), (b, second) = table[1], table[2]
        table[1] = (a, replace(first, byte_offset=second.byte_offset))
        table[2] = (b, replace(second, byte_offset=first.byte_offset))

    arrays = {"ema.a": np.arange(6, dtype="f4"), "ema.b": np.arange(6, 12, dtype="f4")}
    path = make(tmp_path / "c", arrays, change=swap)
    report = verify(path)
    assert not report.ok and "ema.a" in report.text() and "ema.b" in report.text()
    with pytest.raises(CheckpointCorruptError):
        consolidate(path, tmp_path / "out", progress=False)


@pytest.mark.parametrize("pair", ["dcp"], indirect=True)
def test_swapped_places_in_the_metadata(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same in DCP's format."""
    path, _ = pair
    metadata = dcp.FileSystemReader(path).read_metadata()
    places = {k.fqn: v for k, v in metadata.storage_data.items()}
    one, two = places["ema.one.weight"], places["ema.two.weight"]
    one.offset, two.offset = two.offset, one.offset
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert refused(lambda: open_checkpoint(path))
    nothing_is_silent(path, tmp_path / "out")


def test_rows_that_were_never_written(tmp_path: Path) -> None:
    """A save that lost some of its results, all digests as they should be."""
    path = make(
        tmp_path / "c", {"ema.a": np.ones((6, 2), "f4")}, rows(3),
        change=lambda table: table.pop(),  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    with pytest.raises(CheckpointCorruptError):
        open_checkpoint(path)


@pytest.mark.parametrize("format", FORMATS)
def test_scalars_integers_and_booleans_come_through(
    saved: Path, tmp_path: Path, format: str
) -> None:
    """Exact, in a header that keeps data aligned and says what it is."""
    out = tmp_path / "out"
    assert consolidate(saved / f"{format}-1", out, progress=False).ok
    tensors = load_file(out / "model.safetensors")
    expected = values(fresh(1))
    assert torch.equal(tensors["scale"], expected["ema.scale"]) and tensors["scale"].shape == ()
    assert torch.equal(tensors["steps"], torch.tensor(1 << 40))
    assert torch.equal(tensors["mask"], torch.tensor([True, False, True]))
    raw = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 8 == 0
    assert json.loads(raw[8 : 8 + length])["__metadata__"]["format"] == "pt"


# ---------------------------------------------------------------------- random damage


def harm(files: list[Path], random: np.random.Generator, kind: str) -> str:
    """Change one byte of a file, or cut it; every file and both its ends are likely."""
    file = files[random.integers(len(files))]
    data = bytearray(file.read_bytes())
    edge = min(len(data), 8192)
    position = int(
        random.choice(
            [
                random.integers(len(data)),
                random.integers(edge),
                len(data) - 1 - random.integers(edge),
            ]
        )
    )
    if kind == "truncate":
        del data[position:]
    else:
        data[position] ^= int(random.integers(1, 256))
    file.write_bytes(data)
    return f"{kind} of {file.name} at {position}"


def damage(saved: Path, tmp_path: Path, flips: int, cuts: int) -> Iterator[tuple[Path, str]]:
    random = np.random.default_rng(5)
    kinds = ["flip"] * flips + ["truncate"] * cuts
    for number, kind in enumerate(kinds):
        format = FORMATS[number % len(FORMATS)]
        path = tmp_path / "harmed"
        shutil.copytree(saved / f"{format}-1", path)
        yield path, f"{format}: {harm(sorted(path.iterdir()), random, kind)}"
        shutil.rmtree(path)


def check_random_damage(saved: Path, tmp_path: Path, flips: int, cuts: int) -> None:
    expected, ema = values(fresh(1)), fresh(3)
    harmless = 0
    for path, what in damage(saved, tmp_path, flips, cuts):
        assert not verify(path).ok, what
        try:
            ema.load(path, verify=True)
        except EMAError:
            continue
        # Only what load() has no need of can have changed.
        harmless += 1
        found = values(ema)
        assert all(torch.equal(found[key], value) for key, value in expected.items()), what
    assert harmless < flips // 2


def test_random_damage_is_found(saved: Path, tmp_path: Path) -> None:
    check_random_damage(saved, tmp_path, 60, 21)


@pytest.mark.long
def test_much_random_damage_is_found(saved: Path, tmp_path: Path) -> None:
    check_random_damage(saved, tmp_path, 1000, 200)


def check_damage_to_a_foreign_checkpoint(tmp_path: Path, flips: int, cuts: int) -> None:
    """Its metadata has no digest; but no tensor may differ that was read with ``verify``."""
    expected, ema, source = values(fresh(1)), fresh(3), tmp_path / "stock"
    dcp.save({"ema": fresh(1).state_dict(), "n": [1]}, checkpoint_id=source, no_dist=True)
    random = np.random.default_rng(6)
    for kind in ["flip"] * flips + ["truncate"] * cuts:
        path = tmp_path / "harmed"
        shutil.copytree(source, path)
        what = harm([path / "__0_0.distcp"], random, kind)
        verify(path)
        try:
            ema.load(path, verify=True)
        except EMAError:
            pass
        else:
            found = values(ema)
            assert all(torch.equal(found[key], value) for key, value in expected.items()), what
        shutil.rmtree(path)


def test_damage_to_a_foreign_checkpoint(tmp_path: Path) -> None:
    check_damage_to_a_foreign_checkpoint(tmp_path, 20, 8)


@pytest.mark.long
def test_much_damage_to_a_foreign_checkpoint(tmp_path: Path) -> None:
    check_damage_to_a_foreign_checkpoint(tmp_path, 300, 60)


def test_a_refused_load_leaves_an_average_that_refuses_use(saved: Path, tmp_path: Path) -> None:
    for format in FORMATS:
        path = tmp_path / format
        shutil.copytree(saved / f"{format}-1", path)
        flipped(path, path)
        ema = fresh(3)
        with pytest.raises(EMAError):
            ema.load(path, verify=True)
        with pytest.raises(StateError):
            ema.update()
        assert ema.load(saved / f"{format}-1", verify=True) in (1, 100)
        ema.update()


def test_data_without_any_checksum_is_never_called_verified(tmp_path: Path) -> None:
    path = tmp_path / "c"
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save({"ema": fresh(1).state_dict()}, checkpoint_id=path, no_dist=True)
    finally:
        torch.serialization.set_crc32_options(True)
    ema = fresh(3)
    with pytest.raises(EMAError, match="without a CRC32"):
        ema.load(path, verify=True)
    assert ema.load(path) == 0
    report = consolidate(path, tmp_path / "out", progress=False)
    assert report.ok and any("not checked" in note for note in report.notes)


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_cannot_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    path, real = saved / f"{format}-1", os.preadv
    (file,) = {chunk.file for chunk in open_checkpoint(path).tensors["ema.scale"].chunks()}
    number = (path / file).stat().st_ino

    def fails(descriptor: int, buffers: list, position: int) -> int:
        if os.fstat(descriptor).st_ino == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", fails)
    report = verify(path)
    assert not report.ok and f"{file} cannot be read at byte" in report.text()
    with pytest.raises(CheckpointCorruptError, match="cannot be read"):
        consolidate(path, tmp_path / "out", progress=False)
    ema = fresh(3)
    with pytest.raises(CheckpointCorruptError):
        ema.load(path, verify=True)
