"""Worlds of 2 and 4 ranks in which DeepSpeed engines are made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dist.pool import WorkerPool


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, WorkerPool]]:
    pools = {size: WorkerPool(size) for size in (2, 4)}
    yield pools
    for pool in pools.values():
        pool.stop()
