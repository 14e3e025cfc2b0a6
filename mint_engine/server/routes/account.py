"""The caller's key and what became of it: tokens, what was done with it, what it takes up."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.concurrency import run_in_threadpool

from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.state import ServerState, get_state
from mint_engine.types import (
    AuditEventType,
    AuditLogResponse,
    BillingUsageResponse,
    CurrentCheckpointStorageUsageResponse,
)

router = APIRouter(tags=["account"])


@router.post("/auth/token")
async def auth_token(
    caller: Annotated[Caller, Depends(get_caller)], state: Annotated[ServerState, Depends(get_state)]
) -> dict[str, str]:
    """A JWT that stands for the caller's key for an hour. The SDKs fetch one for `sk-` keys."""
    return {"jwt": state.auth.token(caller)}


@router.get("/audit")
async def audit(
    caller: Annotated[Caller, Depends(get_caller)], event_type: AuditEventType = "all", day: date | None = None
) -> AuditLogResponse:
    """What the caller's own key did with checkpoints on a day (UTC; default today), from the request ledger. There are
    no projects, teams or organizations here, so there are no events of them."""
    return await run_in_threadpool(caller.store.audit_log, event_type, day)


@router.get("/billing/usage/events")
async def billing_events(caller: Annotated[Caller, Depends(get_caller)]) -> BillingUsageResponse:
    """Nobody is billed for anything here: always empty."""
    return BillingUsageResponse(data=[])


@router.get("/billing/usage/checkpoints/current")
async def billing_storage(
    caller: Annotated[Caller, Depends(get_caller)],
    project_id: Annotated[str | None, Query(max_length=512)] = None,
) -> CurrentCheckpointStorageUsageResponse:
    """How many checkpoints each of the caller's projects has and how many bytes they take. It costs nothing, so no
    price is given."""
    name = caller.key.name if caller.key is not None else None
    return await run_in_threadpool(lambda: caller.store.storage_usage(project_id, user_name=name))
