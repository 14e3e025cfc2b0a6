"""A real server for tests: uvicorn in a thread, on a free port of this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from mint_engine.engine import Engine, get_engine
from mint_engine.server import Settings, create_app
from mint_engine.server.serve import http_config
from mint_engine.server.state import ServerState


@dataclass
class LiveServer:
    """`url`: "http://127.0.0.1:<port>". `engine`, `app`, `state`: what runs behind it, in this process."""

    url: str
    engine: Engine
    app: FastAPI
    settings: Settings

    @property
    def state(self) -> ServerState:
        state: ServerState = self.app.state.mint
        return state


@contextmanager
def live_server(engine: Engine | None = None, **settings: Any) -> Iterator[LiveServer]:
    """A running server. Ends with the block; an engine that was given stays open.

    Args:
        engine: default a float32 one in MINT_HOME (each test has its own).
        settings: of `Settings`; `models=[str(directory)]` are loaded before the block begins. Models are not written to
            disk at the end unless `park_on_shutdown=True`.
    """
    settings.setdefault("park_on_shutdown", False)
    settings["models"] = [str(name) for name in settings.get("models", [])]
    chosen = Settings(**settings)
    engine = engine or get_engine("float32", Path(chosen.home) if chosen.home else None)
    app = create_app(engine, chosen)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    failed: list[BaseException] = []
    started = threading.Event()

    class Watched(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            try:
                await super().startup(sockets)
            finally:
                started.set()

    server = Watched(http_config(app))

    def run() -> None:
        try:
            server.run(sockets=[listener])
        except BaseException as error:
            failed.append(error)
            started.set()

    thread = threading.Thread(target=run, name="live-server", daemon=True)
    thread.start()
    try:
        assert started.wait(120), "the server did not start"
        assert server.started, f"the server did not start: {failed}"
        yield LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, app, chosen)
    finally:
        _end_polls(app)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def _end_polls(app: FastAPI) -> None:
    """Held polls would hold up the end of the server."""
    promises = app.state.mint.promises
    if promises._loop is not None and not promises._loop.is_closed():
        promises._loop.call_soon_threadsafe(promises.stop, "the test is over")
