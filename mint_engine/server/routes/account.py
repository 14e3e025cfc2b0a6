"""The caller's key and what became of it: tokens, what was done with it, what it takes up."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from starlette.concurrency import run_in_threadpool

from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.state import ServerState, get_state
from mint_engine.store import LedgerEntry

router = APIRouter(tags=["account"])

_AUDIT_ENTRIES = 10_000
_EVENTS = {
    "SaveWeights": "checkpoint_saved",
    "SaveWeightsForSampler": "checkpoint_saved",
    "SaveWeightsExternal": "checkpoint_saved",
    "LoadWeights": "checkpoint_read",
    "MintInterpolateCheckpoints": "checkpoint_saved",
}


@router.post("/auth/token")
async def auth_token(
    caller: Annotated[Caller, Depends(get_caller)], state: Annotated[ServerState, Depends(get_state)]
) -> dict[str, str]:
    """A JWT that stands for the caller's key for an hour. The SDKs fetch one for `sk-` keys."""
    return {"jwt": state.auth.token(caller)}


@router.get("/audit")
async def audit(
    caller: Annotated[Caller, Depends(get_caller)],
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: date | None = None,
) -> dict[str, Any]:
    """What the caller's own key did with checkpoints on a day (UTC; default today), from the request ledger. There are
    no projects, teams or organizations here, so there are no events of them."""
    if event_type not in ("all", "checkpoints"):
        return {"entries": []}
    day = day or datetime.now(UTC).date()
    found = await run_in_threadpool(
        caller.store.ledger.entries, owner=caller.owner, kinds=_EVENTS,
        since=datetime.combine(day, time.min, UTC), until=datetime.combine(day, time.max, UTC), limit=_AUDIT_ENTRIES,
    )  # fmt: skip
    return {"entries": sorted(map(_audit_entry, found), key=lambda entry: str(entry["timestamp"]))}


def _audit_entry(entry: LedgerEntry) -> dict[str, Any]:
    details = {"request_id": entry.request_id, "kind": entry.kind, "status": entry.status, "error": entry.error}
    return {
        "timestamp": entry.accepted.astimezone(UTC).isoformat(),
        "event": _EVENTS[entry.kind],
        "event_details": {name: value for name, value in details.items() if value is not None},
        "model_id": entry.model_id,
        "tinker_path": None,
        "purpose": None,
    }


@router.get("/billing/usage/events")
async def billing_events(caller: Annotated[Caller, Depends(get_caller)]) -> dict[str, Any]:
    """Nobody is billed for anything here: always empty."""
    return {"data": [], "sessions": {}, "cost_data_through": None}


@router.get("/billing/usage/checkpoints/current")
async def billing_storage(
    caller: Annotated[Caller, Depends(get_caller)],
    project_id: Annotated[str | None, Query(max_length=512)] = None,
) -> dict[str, Any]:
    """How many checkpoints the caller has and how many bytes they take. It costs nothing, so no price is given."""
    if project_id is not None:  # what belongs to which project is not summed up
        return {"effective_rate_usd_per_gigabyte_month": None, "data": []}
    size = await run_in_threadpool(caller.store.disk_usage)
    listed = await run_in_threadpool(caller.store.list_user_checkpoints, 1, 0)
    count = listed.cursor.total_count if listed.cursor is not None else len(listed.checkpoints)
    item = {
        "project_id": None,
        "org_user_urn": caller.owner,
        "user_email": None,
        "user_name": caller.key.name if caller.key is not None else None,
        "checkpoint_count": count,
        "size_bytes": size,
        "size_gigabytes": size / 1e9,
        "estimated_monthly_cost_usd": None,
    }
    return {"effective_rate_usd_per_gigabyte_month": None, "data": [item] if count else []}
