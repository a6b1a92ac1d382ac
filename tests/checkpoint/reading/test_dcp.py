"""PyTorch's own checkpoints, read without PyTorch and without running what is in them."""

from __future__ import annotations

import pickle
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from sharded_ema.checkpoint.files import Directory
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.reading.stream import verify_chunk
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
)
from sharded_ema.tools.consolidate import consolidate
from tests.helpers.checkpoints import flip, meta_bytes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def save(path: Path, state: dict) -> Path:
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def state() -> dict:
    torch.manual_seed(0)
    return {
        "plain": torch.randn(5, 4),
        "transposed": torch.randn(5, 4).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(4.6),
        "empty": torch.empty(0, 3),
        "half": torch.randn(7).bfloat16(),
        "int": torch.arange(5),
        "flag": torch.tensor([True, False]),
    }


def read(opened: Checkpoint, key: str) -> torch.Tensor:
    """Put a tensor together from its chunks, much as the loading side does."""
    stored = opened.tensors[key]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool,
             "F8_E4M3": torch.float8_e4m3fn, "U16": torch.uint16}[stored.dtype]  # fmt: skip
    whole = torch.empty(stored.shape, dtype=dtype)
    for chunk in opened.tensors[key].chunks():
        verify_chunk(opened.directory, chunk, key)
        data = (opened.path / chunk.file).read_bytes()
        raw = bytearray(data[chunk.byte_offset : chunk.byte_offset + chunk.num_bytes])
        flat = torch.frombuffer(raw, dtype=dtype)
        if chunk.strides is None:
            block = flat.view(chunk.box.sizes)
        else:
            block = flat.as_strided(chunk.box.sizes, chunk.strides)
        slices = tuple(
            slice(o, o + n) for o, n in zip(chunk.box.offsets, chunk.box.sizes, strict=True)
        )
        whole[slices] = block
    return whole


def test_tensors_of_all_kinds(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path / "c", {**state(), "number": 3, "nested": {"x": [1]}}))
    assert opened.format == "dcp" and not opened.verified_metadata
    assert set(opened.tensors) == set(state())
    for key, tensor in state().items():
        assert torch.equal(read(opened, key), tensor), key


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16])
def test_dtypes_that_torch_stores_in_its_newer_way(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype)
    opened = open_checkpoint(save(tmp_path / "c", {"w": tensor}))
    assert torch.equal(read(opened, "w").to(torch.int64), tensor.to(torch.int64))


def test_metadata_of_early_python_3_11(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which pickles a member of an enumeration as an attribute of its class."""
    monkeypatch.setattr(
        Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self._name_))
    )
    path = save(tmp_path / "c", state())
    monkeypatch.undo()
    assert b"getattr" in (path / ".metadata").read_bytes()
    opened = open_checkpoint(path)
    for key, value in state().items():
        assert torch.equal(read(opened, key), value)


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_a_dtype_we_do_not_know_does_not_hide_the_rest(tmp_path: Path) -> None:
    values = {"model": {"c": torch.zeros(2, dtype=torch.complex32)}, "ema": {"w": torch.ones(2)}}
    opened = open_checkpoint(save(tmp_path / "c", values))
    assert torch.equal(read(opened, "ema.w"), torch.ones(2))


def test_an_average_nested_in_a_users_checkpoint(tmp_path: Path) -> None:
    average = {"ema.w": torch.randn(3), "_meta": torch.from_numpy(meta_bytes(step=5).copy())}
    path = save(tmp_path / "c", {"model": {"w": torch.zeros(3)}, "ema": average})
    opened = open_checkpoint(path)
    assert opened.prefixes() == ["ema."]
    assert opened.meta("ema.")["step"] == 5


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    path = save(tmp_path / "c", state())
    assert open_checkpoint(path).prefixes() == []
    with pytest.raises(CheckpointMismatchError):
        consolidate(path, tmp_path / "out", progress=False)


class Poison:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("where", ["whole", "inside"])
def test_poisoned_metadata_runs_nothing(tmp_path: Path, where: str) -> None:
    path, mark = save(tmp_path / "c", state()), tmp_path / "mark"
    metadata = dcp.FileSystemReader(path).read_metadata()
    metadata.planner_data = Poison(mark)
    poisoned = pickle.dumps(Poison(mark) if where == "whole" else metadata)
    (path / ".metadata").write_bytes(poisoned)
    with pytest.raises(CheckpointCorruptError):
        open_checkpoint(path)
    assert not mark.exists()
    pickle.loads(poisoned)
    assert mark.exists(), "the poison itself works"


def test_poisoned_entry_runs_nothing(tmp_path: Path) -> None:
    path, mark = save(tmp_path / "c", state()), tmp_path / "mark"
    metadata = dcp.FileSystemReader(path).read_metadata()
    (info,) = [v for k, v in metadata.storage_data.items() if k.fqn == "plain"]
    torch.save(Poison(mark), tmp_path / "entry")
    entry = (tmp_path / "entry").read_bytes()
    data = path / info.relative_path
    info.offset, info.length = data.stat().st_size, len(entry)
    data.write_bytes(data.read_bytes() + entry)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointCorruptError):
        open_checkpoint(path).tensors["plain"].chunks()
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside", "..", ""])
def test_paths_that_leave_the_directory(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "c", state())
    (path / "__0_0.distcp").rename(tmp_path / "outside")
    metadata = dcp.FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointCorruptError):
        open_checkpoint(path).tensors["plain"].chunks()


def test_links_that_leave_the_directory(tmp_path: Path) -> None:
    path = save(tmp_path / "c", state())
    (path / "__0_0.distcp").rename(tmp_path / "outside")
    (path / "__0_0.distcp").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointCorruptError):
        open_checkpoint(path).tensors["plain"].chunks()


@pytest.mark.parametrize(
    "offset, length", [(0, 1 << 50), (1 << 50, 10), (-5, 10), (0, 0), (3, 900)]
)
def test_places_that_cannot_be(tmp_path: Path, offset: int, length: int) -> None:
    path = save(tmp_path / "c", state())
    metadata = dcp.FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        info.offset, info.length = offset, length
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointCorruptError):
        open_checkpoint(path).tensors["plain"].chunks()


@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_files_that_are_not_whole(tmp_path: Path, fault: str) -> None:
    path = save(tmp_path / "c", {"plain": torch.ones(1000)})
    data = path / "__0_0.distcp"
    if fault == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    else:
        data.unlink()
    with pytest.raises(CheckpointError, match="plain"):
        open_checkpoint(path).tensors["plain"].chunks()


def test_a_changed_byte_of_the_data_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "c", {"plain": torch.ones(1000)})
    (chunk,) = open_checkpoint(path).tensors["plain"].chunks()
    for position in (0, 1999, 3999):
        flip(path / chunk.file, chunk.byte_offset + position)
        with pytest.raises(CheckpointCorruptError, match="plain"):
            verify_chunk(Directory(path), chunk, "plain")
        flip(path / chunk.file, chunk.byte_offset + position)
    verify_chunk(Directory(path), chunk, "plain")


def test_no_changed_byte_of_the_metadata_crashes_the_reader(tmp_path: Path) -> None:
    path = save(tmp_path / "c", {"plain": torch.ones(3, 2)})
    data = (path / ".metadata").read_bytes()
    random = np.random.default_rng(0)
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 1 << int(random.integers(8))
        (path / ".metadata").write_bytes(changed)
        try:
            opened = open_checkpoint(path)
            for tensor in opened.tensors.values():
                tensor.chunks()
        except CheckpointError:
            pass


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(tmp_path)
    (save(tmp_path / "c", state()) / ".metadata").unlink()
    with pytest.raises(CheckpointUncommittedError):
        open_checkpoint(tmp_path / "c")
