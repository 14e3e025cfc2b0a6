"""`AdminClient`: what a caller did and uses. (On the SDK's own servers that takes an administrator.)"""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING, get_args

from mint_engine.client.connection import build, engine_of, registry_of
from mint_engine.client.futures import APIFuture, value_twin
from mint_engine.errors import UserError
from mint_engine.types import (
    AuditEventType,
    AuditLogResponse,
    BillingUsageResponse,
    CurrentCheckpointStorageUsageResponse,
    GetBillingUsageRequest,
)

if TYPE_CHECKING:
    from mint_engine.client.protocol import ClientEngine


class AdminClient:
    """The audit log and what is used, each an `APIFuture`. `RestClient` has these methods, too.

    Args: as of `ServiceClient`. No session is made.
    """

    def __init__(
        self, engine: ClientEngine | None = None, *, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        self._engine = engine_of(engine, base_url=base_url, api_key=api_key)
        self._registry = registry_of(self._engine)

    def get_telemetry(self) -> None:
        """Nothing is reported to anybody: None."""

    def get_audit_log(self, event_type: AuditEventType = "all", day: date | None = None) -> APIFuture[AuditLogResponse]:
        """What the caller did with checkpoints on a day (UTC; default today), oldest first.

        Servers keep this log. What an engine in this process did is not in it: there one sees what was done without a
        key through servers on the same home directory.
        """
        if event_type not in get_args(AuditEventType):
            raise UserError(f"event_type: expected one of {', '.join(get_args(AuditEventType))}, got {event_type!r}")
        if day is not None and (not isinstance(day, date) or isinstance(day, datetime)):
            raise UserError(f"day: expected a datetime.date, got {day!r}")
        return APIFuture(self._registry.audit_log(event_type, day))

    def get_billing_usage(
        self, starting_on: datetime | str, ending_before: datetime | str
    ) -> APIFuture[BillingUsageResponse]:
        """What was used from one time until before another, both with a time zone ("2026-07-13T00:00:00Z").

        mint-engine bills nobody: of an engine in this process, and of its server, the answer is empty.
        """
        request = build(GetBillingUsageRequest, starting_on=starting_on, ending_before=ending_before)
        return APIFuture(self._registry.billing_usage(request))

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[CurrentCheckpointStorageUsageResponse]:
        """How many checkpoints each project has, or just this one, and how many bytes they take."""
        return APIFuture(self._registry.storage_usage(project_id))

    get_audit_log_async = value_twin(get_audit_log)
    get_billing_usage_async = value_twin(get_billing_usage)
    get_current_checkpoint_storage_usage_async = value_twin(get_current_checkpoint_storage_usage)
