"""Layouts that the PyTorch at hand cannot make."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.dist.ragged import MISSING


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip the tests of such layouts."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        for value in callspec.params.values() if callspec else ():
            if isinstance(value, str) and value in MISSING:
                item.add_marker(pytest.mark.skip(reason=MISSING[value]))
