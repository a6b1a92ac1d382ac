"""Worlds of ranks that live for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sharded_ema.averaging.kernels.fused import extension
from tests.helpers.layouts import MISSING
from tests.helpers.pool import WorkerPool

# What cannot be tested here, and why.
ABSENT = dict(MISSING)
if extension() is None:
    ABSENT["fused"] = "the C extension was not built, as where there is no C compiler"

# Its tests run whole programs.
LAUNCH = Path(__file__).parent / "launch"


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
    """Mark what starts several processes, and skip what cannot be made here."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if {"worlds", "engine_worlds"} & set(fixtures) or LAUNCH in item.path.parents:
            item.add_marker(pytest.mark.dist)
        callspec = getattr(item, "callspec", None)
        for value in callspec.params.values() if callspec else ():
            if isinstance(value, str) and value in ABSENT:
                item.add_marker(pytest.mark.skip(reason=ABSENT[value]))
