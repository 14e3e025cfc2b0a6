"""A caller's account on a server: who they are, what they did, what they have stored; the timeline of a session."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import date
from typing import Any

import httpx

from mint_engine.client.remote.asking import Asking, route_of
from mint_engine.client.remote.failures import unreadable
from mint_engine.client.remote.transport import json_object
from mint_engine.errors import MintError
from mint_engine.types import (
    AuditEventType,
    AuditLogResponse,
    BillingUsageResponse,
    CurrentCheckpointStorageUsageResponse,
    GetBillingUsageRequest,
    WhoamiResponse,
)

TRACE_POLL_SECONDS = 2.0  # while a server is making a timeline; mint-engine's has it at once


class Account(Asking):
    def whoami(self) -> Future[WhoamiResponse]:
        """From the claims of a token that the server gives for the key: there is no address that says it."""

        async def run() -> WhoamiResponse:
            answer = await self._transport.post("auth/token", {})
            claims = _claims(answer)
            return WhoamiResponse(
                user_urn=claims["sub"],
                org_urn=f"tml:organization:{claims['org_id']}",
                email=claims.get("email") or None,
            )

        return self._submit(run)

    def audit_log(self, event_type: AuditEventType, day: date | None) -> Future[AuditLogResponse]:
        return self._get(AuditLogResponse, "audit", event_type=event_type, day=None if day is None else day.isoformat())

    def billing_usage(self, request: GetBillingUsageRequest) -> Future[BillingUsageResponse]:
        return self._get(BillingUsageResponse, "billing", "usage", "events", **request.model_dump(mode="json"))

    def storage_usage(self, project_id: str | None) -> Future[CurrentCheckpointStorageUsageResponse]:
        return self._get(
            CurrentCheckpointStorageUsageResponse, "billing", "usage", "checkpoints", "current", project_id=project_id
        )

    def session_trace(self, session_id: str) -> Future[str]:
        async def run() -> str:
            where = route_of("sessions", session_id, "trace_export")
            while True:
                answer = await self._transport.send("GET", where)
                state = json_object(answer)
                if state.get("status") == "ready" and isinstance(url := state.get("url"), str):
                    return url
                if state.get("status") == "failed":
                    raise MintError(f"the server could not make the timeline of {session_id!r}: {state.get('error')}")
                if state.get("status") == "ready":
                    raise unreadable(answer, "the timeline's url")
                await asyncio.sleep(TRACE_POLL_SECONDS)

        return self._submit(run)


def _claims(answer: httpx.Response) -> Mapping[str, Any]:
    """What the answer's JWT says. Its signature is the server's business, and we have just asked the server."""
    token = json_object(answer).get("jwt")
    try:
        body = token.split(".")[1]  # type: ignore[union-attr]  # AttributeError is caught
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        _ = str(claims["sub"]), str(claims["org_id"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise unreadable(answer, "a JWT with the claims sub and org_id") from error
    return claims
