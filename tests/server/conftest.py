"""What tests of several files use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api import Api
from server_fixture import LiveServer, live_server
from stub_engine import BASE, StubEngine
from victim import Victim, victim


@pytest.fixture
def engine(tmp_path: Path) -> StubEngine:
    """An engine that does what the test says."""
    return StubEngine(tmp_path / "home")


@pytest.fixture
def server(engine: StubEngine) -> Iterator[LiveServer]:
    """A server of ``engine`` that soon gives up on gaps and answers polls."""
    with live_server(engine, models=[BASE], gap_timeout_s=0.3, long_poll_s=0.5) as live:
        yield live


@pytest.fixture
def api(server: LiveServer) -> Iterator[Api]:
    with Api(server.url) as client:
        yield client


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One server for all attacks: it takes seconds to start, and has to outlive them all."""
    with victim(tmp_path_factory.mktemp("victim")) as server:
        yield server
