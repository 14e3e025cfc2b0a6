"""Sessions: begin, heartbeat, end. And what clients report about themselves."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.document import ErrorAnswer
from mint_engine.server.lifecycle import end_session
from mint_engine.server.once import once
from mint_engine.server.reading import body_of, read, read_body
from mint_engine.server.state import ServerState, get_state
from mint_engine.wire.requests import (
    CreateSessionRequest,
    FinishSessionRequest,
    SessionHeartbeatRequest,
    TelemetryRequest,
)

log = logging.getLogger(__name__)
router = APIRouter(tags=["sessions"])

CallerOf = Annotated[Caller, Depends(get_caller)]
State = Annotated[ServerState, Depends(get_state)]

_FINISHED: dict[int | str, dict[str, Any]] = {410: {"model": ErrorAnswer, "description": "The session is finished."}}


@router.post("/create_session", openapi_extra=body_of(CreateSessionRequest))
async def create_session(request: Request, caller: CallerOf, state: State) -> dict[str, Any]:
    body = await read(CreateSessionRequest, request, caller, state)

    async def create() -> dict[str, Any]:
        session_id = await run_in_threadpool(
            lambda: state.engine.create_session(
                owner=caller.owner, tags=body.tags, user_metadata=body.user_metadata, project_id=body.project_id,
                display_name=body.display_name,
            )
        )  # fmt: skip
        state.sessions.touch(session_id, caller.owner)
        sdk = body.sdk_version[:40] or "unknown"
        log.info("session %s: %s, sdk %s", session_id, body.display_name or "no name", sdk)
        return {"type": "create_session", "session_id": session_id}

    return await once(request, caller.owner, body.model_dump_json(), create)


@router.post("/session_heartbeat", openapi_extra=body_of(SessionHeartbeatRequest), responses=_FINISHED)
async def session_heartbeat(request: Request, caller: CallerOf, state: State) -> dict[str, Any]:
    """Every ten seconds from each client. 410 tells it that the session was finished and it may stop."""
    body = await read(SessionHeartbeatRequest, request, caller, state)
    session = await state.sessions.check(caller, body.session_id)
    if session.finished:
        raise HTTPException(410, f"session {body.session_id} is finished")
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish", openapi_extra=body_of(FinishSessionRequest))
async def finish_session(session_id: str, request: Request, caller: CallerOf, state: State) -> dict[str, Any]:
    """The client closes. After a success its models are let go; after anything else they are put aside."""
    body = await read(FinishSessionRequest, request, caller, state)
    await state.sessions.check(caller, session_id)
    await run_in_threadpool(caller.store.finish_session, session_id, body.status, body.detail)
    keep = body.status != "success"
    await state.sessions.finish(caller, session_id, end_session(state, caller, session_id, keep=keep))
    return {"type": "finish_session", "session_id": session_id}


@router.post("/telemetry", openapi_extra=body_of(TelemetryRequest))
async def telemetry(request: Request, caller: CallerOf, state: State) -> dict[str, Any]:
    """Accepted, so that the SDKs are content, and dropped: nothing is collected about anybody."""
    await read_body(request, caller, state)
    return {"status": "accepted"}
