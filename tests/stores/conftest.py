"""Servers that live for the whole session, and a proxy before each for the time of a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.stores import NEEDED, Proxy, Server, Store, missing


@pytest.fixture(scope="session", params=sorted(NEEDED))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A server of each kind that can be started here."""
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    server = Server(request.param, tmp_path_factory.mktemp("store"))
    yield server
    server.stop()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy to a store of which nothing is known yet."""
    proxy = Proxy(server.store)
    proxy.store.connect()
    yield proxy
    proxy.stop()


@pytest.fixture
def store(server: Server) -> Store:
    """The store itself."""
    server.store.connect()
    return server.store
