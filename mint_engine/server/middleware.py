"""Around every request: its id, its log line, its metrics, and an answer whatever happens."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mint_engine.server.context import enter
from mint_engine.server.failures import RestartingError, describe

if TYPE_CHECKING:
    from mint_engine.server.state import ServerState

log = logging.getLogger("mint_engine.server.access")

HUNG_UP = 499
"""The status in logs and metrics of a request that was broken off; nginx made the number known."""

# Asked all the time, and of interest to nobody: their lines are for debugging.
_QUIET = ("/retrieve_future", "/session_heartbeat", "/telemetry", "/healthz", "/health", "/metrics")
_ALWAYS = ("/healthz", "/health", "/metrics", "/retrieve_future", "/retrieve_futures")  # also of a server that stops


class Requests:
    """ASGI middleware. ``before``: awaited at each request, to start what a lifespan may not have started."""

    def __init__(self, app: ASGIApp, state: ServerState, before: Callable[[], Awaitable[None]]) -> None:
        self._app, self._state, self._before = app, state, before

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = enter(headers.get("x-request-id"), headers.get("x-idempotency-key"))
        begun, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", context.request_id.encode())]
            await send(message)

        try:
            await self._before()
            if self._state.promises.stopping is not None and not scope["path"].endswith(_ALWAYS):
                raise RestartingError(self._state.promises.stopping)
            await self._app(scope, receive, answer)
        except ClientDisconnect:  # in the middle of its request: there is nobody to answer
            status = status or HUNG_UP
        except Exception as error:
            failure = describe(error)
            if status == 0:
                body = {"detail": failure.detail, "request_id": context.request_id}
                await JSONResponse(body, failure.status, failure.headers)(scope, receive, answer)
        finally:
            self._record(scope, status, time.perf_counter() - begun)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "unknown"
        self._state.metrics.request(scope["method"], route, status, seconds)
        path = route if "/downloads/" in scope["path"] else scope["path"]  # such a link is a key
        level = logging.DEBUG if (status < 400 and path.endswith(_QUIET)) or status == 408 else logging.INFO
        if log.isEnabledFor(level):
            log.log(
                level, "%s %s %d %.1f ms", scope["method"], path, status, 1000 * seconds,
                extra={"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 6)},
            )  # fmt: skip
