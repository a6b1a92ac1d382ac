"""Worlds of ranks that live for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.helpers.layouts import MISSING
from tests.helpers.pool import WorkerPool


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, WorkerPool]]:
    """Worlds of 1 to 4 ranks."""
    pools = {size: WorkerPool(size) for size in (1, 2, 3, 4)}
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture(scope="session")
def engine_worlds() -> Iterator[dict[int, WorkerPool]]:
    """Worlds of their own for DeepSpeed, which changes what it is imported into."""
    pools = {size: WorkerPool(size) for size in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.stop()


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip the tests of layouts that the PyTorch at hand cannot make."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        for value in callspec.params.values() if callspec else ():
            if isinstance(value, str) and value in MISSING:
                item.add_marker(pytest.mark.skip(reason=MISSING[value]))
