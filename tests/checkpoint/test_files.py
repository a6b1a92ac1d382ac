"""Files that are held open: no more than so many, none shared by two readers, none lost."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from sharded_ema.checkpoint.files import Directory, OpenFiles
from sharded_ema.errors import CheckpointCorruptError

NUM_FILES = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(NUM_FILES):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 8)
    return tmp_path


def held(folder: Path) -> int:
    """How many descriptors of this process are of files in a directory."""
    links = list(Path("/proc/self/fd").iterdir())
    return sum(os.path.lexists(link) and link.readlink().parent == folder for link in links)


def read(directory: Directory, number: int) -> int:
    buffer = np.empty(8, np.uint8)
    directory.read_into(str(number), buffer, 0)
    assert (buffer == buffer[0]).all()
    return int(buffer[0])


def test_so_many_stay_open_and_those_used_last(folder: Path) -> None:
    with OpenFiles() as files:
        one = Directory(folder, files)
        for number in [*range(NUM_FILES), 0]:
            assert read(one, number) == number
        assert held(folder) == 32
        (folder / "0").unlink()
        assert read(one, 0) == 0, "it is open still"
        (folder / "1").unlink()
        with pytest.raises(CheckpointCorruptError, match="is missing"):
            read(one, 1)
    assert held(folder) == 0
    assert read(one, 2) == 2, "what was closed is opened again"


def test_a_file_has_one_reader_at_a_time(folder: Path) -> None:
    with OpenFiles() as files:
        one = Directory(folder, files)
        with files.open(one, "3") as first, files.open(one, "3") as second:
            assert first is not second
            assert held(folder) == 2
        with files.open(one, "3") as again:
            assert again in (first, second)
        assert held(folder) == 2
    assert held(folder) == 0


def test_a_file_that_could_not_be_read_is_not_kept(folder: Path) -> None:
    directory = Directory(folder)
    with pytest.raises(CheckpointCorruptError, match="ends at byte"):
        directory.read_into("5", np.empty(9, np.uint8), 0)
    assert held(folder) == 0


def test_what_nobody_closes_goes_with_its_owner(folder: Path) -> None:
    directory = Directory(folder)
    assert read(directory, 7) == 7 and held(folder) == 1
    del directory
    gc.collect()
    assert held(folder) == 0
