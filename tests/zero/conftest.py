"""Worlds of 2 and 4 ranks in which DeepSpeed engines are made."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.dist.pool import WorkerPool

if importlib.util.find_spec("deepspeed") is None:
    # pytest imports the modules beside this one only if they are not ignored here.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def zero_worlds() -> Iterator[dict[int, WorkerPool]]:
    pools = {size: WorkerPool(size) for size in (2, 4)}
    yield pools
    for pool in pools.values():
        pool.stop()
