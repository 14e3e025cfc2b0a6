"""The application: everything put together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from mint_engine import __version__
from mint_engine.errors import MintError
from mint_engine.server import lifecycle, operations, resume
from mint_engine.server.auth import Auth
from mint_engine.server.caller import Caller
from mint_engine.server.context import current
from mint_engine.server.document import document
from mint_engine.server.failures import describe
from mint_engine.server.gate import Gate
from mint_engine.server.ledger import Ledger
from mint_engine.server.metrics import Metrics
from mint_engine.server.middleware import Requests
from mint_engine.server.openai import router as openai_router
from mint_engine.server.promises import Promises
from mint_engine.server.routes import (
    account,
    checkpoints,
    config,
    downloads,
    futures,
    health,
    mint,
    registry,
    sampling,
    sessions,
    training,
    uploads,
)  # fmt: skip
from mint_engine.server.samplers import Samplers
from mint_engine.server.sequencer import Sequencer, Start
from mint_engine.server.served_models import ServedModels
from mint_engine.server.sessions import Sessions
from mint_engine.server.settings import Settings
from mint_engine.server.shortcut import Shortcut
from mint_engine.server.signed_urls import Signer
from mint_engine.server.state import ServerState

if TYPE_CHECKING:
    from mint_engine.engine import Engine

log = logging.getLogger(__name__)

_API = (account, checkpoints, config, downloads, futures, mint, registry, sampling, sessions, training, uploads)


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """An ASGI application that serves ``engine``.

    It can be mounted in another one: ``app.mount("/", create_app(engine))``. A mounted application's lifespan does not
    run, so what it would start is started by the first request; at the end, await :func:`stop` if models are to
    survive, and close the engine, which stays yours.

    Without ``settings.models`` clients may name whatever base models the engine has loaded.
    """
    settings = settings or Settings()
    state = _make_state(engine, settings)
    startup = _Startup(state)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await startup()
        yield
        await stop(app)

    app = FastAPI(
        title="mint-engine", version=__version__, lifespan=lifespan,
        description="LoRA training and sampling: the protocol of the MinT and Tinker SDKs, and an OpenAI-compatible "
        "one for inference.",
    )  # fmt: skip
    app.state.mint = state
    app.add_middleware(Shortcut, state=state, refuse=_on_refusal)
    app.add_middleware(Gate)
    app.add_middleware(Requests, state=state, before=startup)  # added last: it is the outermost
    app.add_exception_handler(RequestValidationError, _on_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_exception)
    app.add_exception_handler(MintError, _on_error)
    for module in _API:
        app.include_router(module.router, prefix="/api/v1")
    app.include_router(health.api_router, prefix="/api/v1")
    app.include_router(health.router)
    app.include_router(openai_router, prefix="/v1")
    app.include_router(openai_router, prefix="/oai/api/v1")
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


async def stop(app: FastAPI) -> None:
    """The end of an application: polls are answered, what runs is finished, models go to disk. Call it once."""
    state: ServerState = app.state.mint
    await lifecycle.stop(state)


def _make_state(engine: Engine, settings: Settings) -> ServerState:
    promises = Promises(
        result_ttl=settings.result_ttl_s, fetched_ttl=settings.fetched_ttl_s, budget=settings.memory_budget_bytes
    )
    ledger = Ledger(engine.store)
    promises.on_done.append(ledger.record)

    def touch(session_id: str, owner: str) -> None:
        sessions.touch(session_id, owner)

    def restart(caller: Caller, kind: str, body: bytes) -> Start:
        return operations.start(engine, caller, operations.load(kind, body))

    auth = Auth(engine.store, settings)
    engine.store.disk_limit = lambda owner: auth.quotas.disk_limit(engine.store, owner)
    samplers = Samplers(engine, promises, most=settings.max_resident_samplers, touch=touch)
    sequencer = Sequencer(
        engine, promises, gap_timeout=settings.gap_timeout_s, touch=touch, restart=restart,
        reserve=lambda caller: auth.quotas.reserve_model(caller, engine),
    )  # fmt: skip
    sessions = Sessions(settings.session_timeout_s, lambda session_id: lifecycle.put_aside(state, session_id))
    state = ServerState(
        engine=engine,
        settings=settings,
        promises=promises,
        sequencer=sequencer,
        sessions=sessions,
        samplers=samplers,
        served=ServedModels(engine, settings.models),
        ledger=ledger,
        metrics=Metrics(engine, promises),
        auth=auth,
        signer=Signer(engine.store.home, public_url=settings.public_url),
    )
    return state


class _Startup:
    """Done once: by the lifespan where there is one, else by the first request."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._begun: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        begun = self._begun
        if begun is None or (begun.done() and (begun.cancelled() or begun.exception() is not None)):
            begun = self._begun = asyncio.get_running_loop().create_task(
                self._run()
            )  # anew: the model may be there now
        if not begun.done():
            await asyncio.shield(begun)

    async def _run(self) -> None:
        for loading in self._state.served.load():
            await asyncio.wrap_future(loading)
        resume.take_up_others(self._state.engine.store.home, self._state.promises)
        self._state.housekeeping = lifecycle.Housekeeping(self._state)
        self._state.housekeeping.start()


# ---- errors ----------------------------------------------------------------------------------------------------------


def _answer(status: int, detail: Any, headers: Mapping[str, str] | None = None) -> JSONResponse:
    context = current()
    body = {"detail": detail} if context is None else {"detail": detail, "request_id": context.request_id}
    return JSONResponse(body, status, dict(headers or {}))


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    failure = describe(error)
    return _answer(failure.status, failure.detail, failure.headers)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return _answer(error.status_code, error.detail, error.headers)


async def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    handler = _on_http_exception if isinstance(error, StarletteHTTPException) else _on_error
    return await handler(request, error)
