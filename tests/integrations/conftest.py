"""What the tests of training stacks have shown, as a table for the documentation.

``@pytest.mark.shows(integration, backend)`` says what a test is about; of those that passed
``MATRIX=file`` writes the table, as ``make test-stacks`` does.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

SHOWN = pytest.StashKey[set[tuple[str, str]]]()
BACKENDS = ("one process", "DDP", "FSDP1", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3")
HEAD = """\
# Integrations and backends

Written by `make test-stacks` from the tests that passed, on two CPU ranks or in one process, with
{versions}.

"""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SHOWN] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" and report.passed:
        for mark in item.iter_markers("shows"):
            report.user_properties.append(("shows", list(mark.args)))
    return report


class Collector:
    """Notes what passed, wherever it ran."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        shown = self._config.stash[SHOWN]
        shown.update(tuple(value) for name, value in report.user_properties if name == "shows")  # type: ignore[arg-type]


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(Collector(session.config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = os.environ.get("MATRIX")
    is_worker = hasattr(session.config, "workerinput")
    if target and not is_worker:
        Path(target).write_text(table(session.config.stash[SHOWN]))


def table(shown: set[tuple[str, str]]) -> str:
    """The documentation's page."""
    names = sorted({name for name, _ in shown}, key=str.lower)
    packages = [name for name in names if name not in ("Fabric",)]
    versions = ", ".join(f"{p} {version(p.replace('_', '-'))}" for p in ("torch", *packages))
    lines = [
        "| | " + " | ".join(BACKENDS) + " |",
        "|---" * (len(BACKENDS) + 1) + "|",
        *(
            f"| {name} | " + " | ".join("yes" * ((name, b) in shown) for b in BACKENDS) + " |"
            for name in names
        ),
    ]
    return HEAD.format(versions=versions) + "\n".join(lines) + "\n"
