"""`mint-engine serve`: a process of its own around the application."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from mint_engine.engine import Engine
from mint_engine.errors import MintError, UserError
from mint_engine.server import logs
from mint_engine.server.app import create_app
from mint_engine.server.banner import banner
from mint_engine.server.connections import Protocol
from mint_engine.server.settings import Settings
from mint_engine.server.state import ServerState
from mint_engine.store import Store

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that it is not closed under a request
HTTP_GRACE_S = 10
BACKLOG = 4096
SMALL_BODY = 16 << 20
"""tinker 0.22 puts half a million numbers into a request, whatever it is told; JSON takes some 23 bytes for each."""
SWITCH_S = 0.0005
"""How long the engine's thread may keep the interpreter while a request waits for it; Python's own is 5 ms."""


def run(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit code.

    Raises:
        UserError: settings that cannot be served. ModelError: a base model that cannot be loaded.
    """
    logs.configure(settings.log_format, settings.log_level)
    if not settings.models:
        raise UserError("models: expected at least one, such as --model smollm2-135m")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server takes over: nothing is lost yet
    with ExitStack() as stack:
        store = Store(settings.home_directory, database_url=settings.database_url)
        stack.callback(store.close)
        keys = store.keys.any()
        check_address(settings, keys)
        warn_of_small_bodies(settings)
        listener = stack.enter_context(_bind(settings))  # before minutes of loading: a port that is taken shows at once
        _raise_open_files()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        engine = Engine(
            dtype=settings.dtype,
            device=settings.device,
            home=settings.home_directory,
            kv_cache_bytes=settings.kv_cache_bytes,
            store=store,
            deterministic=settings.deterministic,
            masked_logprobs=settings.masked_logprobs,
            activation_bytes=settings.activation_bytes,
            sampling_share=settings.sampling_share,
            speculation=settings.speculation,
            weights=settings.weights,
        )
        stack.callback(engine.close)
        for name in settings.models:
            engine.load_base(name).result()
            with suppress(MintError, OSError, ValueError):  # a model may have no tokenizer
                engine.tokenizer(name)
        app = create_app(engine, settings)
        url = _url(settings, listener)
        sys.setswitchinterval(SWITCH_S)
        gc.collect()
        gc.freeze()  # the modules and models stay: looking through them would stop every request for half a second
        server = _Server(
            http_config(app), app.state.mint, lambda: print(banner(engine, settings, url, keys=keys), flush=True)
        )
        server.run(sockets=[listener])
    return 0


def http_config(app: FastAPI) -> uvicorn.Config:
    """How the app is served."""
    return uvicorn.Config(
        app, http=Protocol, log_config=None, access_log=False, server_header=False, ws="none", lifespan="on",
        backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=HTTP_GRACE_S,
    )  # fmt: skip


def check_address(settings: Settings, keys: bool) -> None:
    """Raises UserError for an address that others can reach while nobody needs a key."""
    if keys or settings.allow_anonymous or _is_loopback(settings.host):
        return
    raise UserError(
        f"host: no keys are configured, so the server listens on loopback only, not on {settings.host!r}: create one "
        "with `mint-engine keys create NAME`, or say --allow-anonymous"
    )


def warn_of_small_bodies(settings: Settings) -> None:
    """tinker 0.22 is told what a request may be, and does not listen."""
    if settings.max_request_bytes < SMALL_BODY:
        log.warning(
            "max_request_bytes: expected at least %d, got %d: tinker 0.22 sends larger requests, which are refused",
            SMALL_BODY, settings.max_request_bytes,
        )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn, but a signal is a reason to end well: held polls are answered, and the exit code is 0."""

    def __init__(self, config: uvicorn.Config, state: ServerState, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._state, self._ready = state, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping: finishing what runs")
        self._state.promises.stop("the server is restarting: try again")
        await asyncio.sleep(0)  # the polls answer
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True  # the second Ctrl-C
        self.should_exit = True


def _bind(settings: Settings) -> socket.socket:
    """A socket that does not listen yet: until the models are loaded clients are refused, and try again."""
    with ExitStack() as stack:
        try:
            family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
            listener = stack.enter_context(socket.socket(family))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise UserError(f"host, port: cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
        stack.pop_all()
        return listener


def _url(settings: Settings, listener: socket.socket) -> str:
    if settings.public_url:
        return settings.public_url
    host = socket.gethostname() if settings.host in ("0.0.0.0", "::", "") else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _raise_open_files() -> None:
    """Thousands of held polls are thousands of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("open files: at most %d, before %d", hard, soft)
