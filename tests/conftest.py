"""Worlds of 2, 3 and 4 ranks that live for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dist.pool import WorkerPool


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, WorkerPool]]:
    pools = {size: WorkerPool(size) for size in (2, 3, 4)}
    yield pools
    for pool in pools.values():
        pool.stop()
