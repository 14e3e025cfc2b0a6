"""Is it alive, and how is it doing."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from mint_engine.server.state import ServerState, get_state

router = APIRouter(tags=["health"])
api_router = APIRouter(tags=["health"])

State = Annotated[ServerState, Depends(get_state)]

_STOPPING: dict[int | str, dict[str, Any]] = {503: {"description": "The server is about to stop."}}


@router.get("/health", responses=_STOPPING)
@router.get("/healthz", responses=_STOPPING)
@api_router.get("/healthz", responses=_STOPPING)
async def healthz(state: State) -> JSONResponse:
    """200 while requests are taken, 503 once the server is about to stop."""
    if state.promises.stopping is not None:
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: State) -> Response:
    """For Prometheus."""
    return Response(state.metrics.render(), media_type=state.metrics.content_type)
