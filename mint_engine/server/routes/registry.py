"""What is recorded: sessions, training runs, samplers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool

from mint_engine.errors import UserError
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.reading import body_of, read
from mint_engine.server.signed_urls import Grant
from mint_engine.server.state import ServerState, get_state
from mint_engine.types import (
    GetSamplerResponse,
    GetSessionResponse,
    ListSessionsResponse,
    SessionSearchResponse,
    TrainingRun,
    TrainingRunsResponse,
)
from mint_engine.wire.requests import AssignProjectRequest, SessionSearchRequest

router = APIRouter(tags=["registry"])

Who = Annotated[Caller, Depends(get_caller)]
State = Annotated[ServerState, Depends(get_state)]
Scope = Annotated[
    Literal["owned", "accessible"], Query(description="The caller's own, or all the caller may read (published).")
]
Id = Annotated[str, Query(max_length=512)]
Limit = Annotated[int, Query(ge=0, le=10_000)]
Offset = Annotated[int, Query(ge=0, le=2**31)]


@router.get("/training_runs")
async def list_training_runs(
    caller: Who,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: Scope = "owned",
    project_id: Id | None = None,
) -> TrainingRunsResponse:
    """Those used last first."""
    return await run_in_threadpool(
        lambda: caller.store.list_runs(limit, offset, project_id=project_id, access_scope=access_scope)
    )


@router.get("/training_runs/{run_id}")
async def get_training_run(caller: Who, run_id: str, access_scope: Scope = "owned") -> TrainingRun:
    return await run_in_threadpool(lambda: caller.store.get_run(run_id, access_scope=access_scope))


@router.get("/sessions")
async def list_sessions(
    caller: Who, limit: Limit = 20, offset: Offset = 0, access_scope: Scope = "owned"
) -> ListSessionsResponse:
    """Session ids, newest first."""
    return await run_in_threadpool(lambda: caller.store.list_sessions(limit, offset, access_scope=access_scope))


@router.post("/sessions/search", openapi_extra=body_of(SessionSearchRequest))
async def search_sessions(caller: Who, state: State, request: Request) -> SessionSearchResponse:
    """The caller's sessions that fit the query, newest first, a page at a time."""
    query = await read(SessionSearchRequest, request, caller, state)
    return await run_in_threadpool(caller.store.search_sessions, query)


@router.get("/sessions/{session_id}")
async def get_session(caller: Who, session_id: str, access_scope: Scope = "owned") -> GetSessionResponse:
    return await run_in_threadpool(lambda: caller.store.get_session(session_id, access_scope=access_scope))


@router.put("/sessions/{session_id}/project", openapi_extra=body_of(AssignProjectRequest))
async def assign_project(caller: Who, state: State, request: Request, session_id: str) -> dict[str, Any]:
    """Projects are labels here: any name will do."""
    body = await read(AssignProjectRequest, request, caller, state)
    if body.project_id is None:
        raise UserError("project_id: expected a name, got none")
    await run_in_threadpool(lambda: caller.store.update_session(session_id, project_id=body.project_id))
    return {}


@router.get("/sessions/{session_id}/trace_export")
async def export_trace(caller: Who, state: State, request: Request, session_id: str) -> dict[str, str]:
    """A link to the session's requests as a timeline, in the JSON that Perfetto and chrome://tracing read."""
    await run_in_threadpool(caller.store.get_session, session_id)
    grant = Grant(caller.owner, "trace", session_id, "trace.json")
    return {"status": "ready", "url": state.signer.link(request, grant)[0]}


@router.get("/samplers/{sampler_id}")
async def get_sampler(caller: Who, sampler_id: str) -> GetSamplerResponse:
    return await run_in_threadpool(caller.store.get_sampler, sampler_id)
