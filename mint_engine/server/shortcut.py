"""The requests of every training step and every sample, straight to their endpoints.

FastAPI's routing and dependencies take longer than these endpoints do, and the event loop shares the interpreter with
the engine's thread. The routes stay where they are: they are what the OpenAPI document shows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mint_engine.errors import MintError
from mint_engine.server.gate import admit
from mint_engine.server.routes.futures import retrieve_future
from mint_engine.server.routes.sampling import asample
from mint_engine.server.routes.training import forward_backward, optim_step

if TYPE_CHECKING:
    from mint_engine.server.caller import Caller
    from mint_engine.server.state import ServerState

_PREFIX = "/api/v1"
_ENDPOINTS: dict[str, Callable[[Request, Caller, ServerState], Awaitable[Response]]] = {
    f"/{endpoint.__name__}": endpoint for endpoint in (forward_backward, optim_step, retrieve_future, asample)
}


class Shortcut:
    """ASGI middleware, the innermost. ``refuse``: the answer to a request that an endpoint refused."""

    def __init__(
        self, app: ASGIApp, state: ServerState, refuse: Callable[[Request, Exception], Awaitable[Response]]
    ) -> None:
        self._app, self._state, self._refuse = app, state, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = f"{scope.get('root_path', '')}{_PREFIX}"
        whole: str = scope.get("path", "")
        path = whole.removeprefix(prefix) if whole.startswith(prefix) else ""
        endpoint = _ENDPOINTS.get(path) if scope.get("method") == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = SimpleNamespace(path=path)  # for the metrics
        request = Request(scope, receive)
        try:
            response = await endpoint(request, await admit(scope), self._state)
        except (HTTPException, MintError) as error:
            response = await self._refuse(request, error)
        await response(scope, receive, send)
