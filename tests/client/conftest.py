"""A fake engine, the same behind HTTP, and our client of it. (test_clients.py has fixtures of its own.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_engine import FakeEngine
from fake_server import FakeServer
from remote_helpers import ADDRESS

import mint
from mint_engine.client.remote import Address, RemoteEngine, transport


@pytest.fixture
def engine(tmp_path) -> FakeEngine:
    return FakeEngine(tmp_path / "home")


@pytest.fixture
def server(engine) -> FakeServer:
    return FakeServer(engine)


@pytest.fixture
def connect(server, engine) -> Iterator[Callable[..., RemoteEngine]]:
    made: list[RemoteEngine] = []

    def make(address: Address = ADDRESS, **options) -> RemoteEngine:
        made.append(RemoteEngine(address, wire=server, **options))
        return made[-1]

    yield make
    server.fault = server.after = None
    engine.gate.set()
    for remote in made:
        remote.close()


@pytest.fixture
def service(connect) -> mint.ServiceClient:
    return mint.ServiceClient(engine=connect())


@pytest.fixture
def trainer(service) -> mint.TrainingClient:
    return service.create_lora_training_client("tiny")


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(transport, "LAST_DELAY", 0.01)
