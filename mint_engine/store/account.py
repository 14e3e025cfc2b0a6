"""What an owner did and what it takes up: the audit log, the timeline of a session, the bytes of each project.

What was done is in the ledger, which servers write. An engine in one's own process writes no line of it.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any, get_args

from sqlalchemy import func, select

from mint_engine import durable
from mint_engine.errors import UserError
from mint_engine.store import schema
from mint_engine.store.archive import Archive
from mint_engine.store.ledger import Ledger
from mint_engine.store.names import check_text, file_name
from mint_engine.store.records import SCOPE, LedgerEntry
from mint_engine.store.sessions import Sessions
from mint_engine.types import (
    AuditEventType,
    AuditLogEntry,
    AuditLogResponse,
    CurrentCheckpointStorageUsageItem,
    CurrentCheckpointStorageUsageResponse,
)

_sessions, _runs, _checkpoints = schema.sessions, schema.runs, schema.checkpoints

AUDIT_ENTRIES = 10_000
TRACED_REQUESTS = 50_000
_EVENTS = {
    "SaveWeights": "checkpoint_saved",
    "SaveWeightsForSampler": "checkpoint_saved",
    "SaveWeightsExternal": "checkpoint_saved",
    "LoadWeights": "checkpoint_read",
    "MintInterpolateCheckpoints": "checkpoint_saved",
}


class Account(Sessions, Archive):
    ledger: Ledger

    def audit_log(self, event_type: AuditEventType = "all", day: date | None = None) -> AuditLogResponse:
        """What this owner did with checkpoints on a day (UTC; default today), oldest first. There are no projects,
        teams or organizations here, so there are no events of them."""
        if event_type not in get_args(AuditEventType):
            raise UserError(f"event_type: expected one of {', '.join(get_args(AuditEventType))}, got {event_type!r}")
        if event_type not in ("all", "checkpoints"):
            return AuditLogResponse(entries=[])
        day = day or datetime.now(UTC).date()
        found = self.ledger.entries(
            owner=self.owner, kinds=_EVENTS, since=datetime.combine(day, time.min, UTC),
            until=datetime.combine(day, time.max, UTC), limit=AUDIT_ENTRIES,
        )  # fmt: skip
        return AuditLogResponse(entries=sorted(map(_audit_entry, found), key=lambda entry: entry.timestamp))

    def storage_usage(
        self, project_id: str | None = None, *, user_name: str | None = None
    ) -> CurrentCheckpointStorageUsageResponse:
        """How many checkpoints each of this owner's projects has, or just this one, and how many bytes they take.

        It costs nothing, so no price is given. `user_name`: what the answer calls the owner.
        """
        check_text(project_id, "project_id")
        project = func.coalesce(_sessions.c.project_id, _runs.c.project_id)  # as when runs are listed
        query = (
            select(project, func.count(), func.sum(_checkpoints.c.size_bytes))
            .select_from(_checkpoints)
            .join(_runs, _runs.c.run_id == _checkpoints.c.run_id)
            .outerjoin(_sessions, _sessions.c.session_id == _runs.c.session_id)
            .where(self._visible(False))
            .group_by(project)
            .order_by(func.sum(_checkpoints.c.size_bytes).desc())
        )
        if project_id is not None:
            query = query.where(project == project_id)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        items = [
            CurrentCheckpointStorageUsageItem(
                project_id=name, org_user_urn=self.owner, user_name=user_name, checkpoint_count=int(count),
                size_bytes=int(size), size_gigabytes=int(size) / 1e9,
            )
            for name, count, size in rows
        ]  # fmt: skip
        return CurrentCheckpointStorageUsageResponse(data=items)

    def session_trace(self, session_id: str) -> dict[str, Any]:
        """A session's newest requests in the Trace Event Format, which Perfetto and chrome://tracing read: "complete"
        events, in microseconds, and a row for each model and sampler."""
        self.get_session(session_id)
        rows: dict[str, int] = {}
        events: list[dict[str, Any]] = []
        for entry in reversed(self.ledger.entries(owner=self.owner, limit=TRACED_REQUESTS)):
            name = entry.model_id or entry.request_id.partition(SCOPE)[0]
            if name.startswith(f"{session_id}:"):
                events.append(_trace_event(entry, rows.setdefault(name, len(rows))))
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
            for name, row in rows.items()
        ]
        return {"traceEvents": [*names, *events], "displayTimeUnit": "ms", "otherData": {"session_id": session_id}}

    def session_trace_file(self, session_id: str) -> Path:
        """The same as a file, kept for a day. Raises UserError for a session of which the ledger has no request."""
        trace = self.session_trace(session_id)
        if not trace["traceEvents"]:
            raise UserError(
                f"session_id: there is no timeline of {session_id!r}: it is made of the requests to a server "
                "(mint-engine serve), and an engine in one's own process keeps none"
            )
        target = self.home / "archives" / "traces" / f"{file_name(session_id, 'session_id')}.json"
        with durable.storage_errors(f"writing the timeline of {session_id}"):
            self._remove_old_archives()
            durable.make_directory(target.parent)
            with durable.replacing_file(target) as temporary:
                temporary.write_text(json.dumps(trace))
        return target


def _audit_entry(entry: LedgerEntry) -> AuditLogEntry:
    details = {"request_id": entry.request_id, "kind": entry.kind, "status": entry.status, "error": entry.error}
    return AuditLogEntry(
        timestamp=entry.accepted.astimezone(UTC),
        event=_EVENTS[entry.kind],
        event_details={name: value for name, value in details.items() if value is not None},
        model_id=entry.model_id,
    )


def _trace_event(entry: LedgerEntry, row: int) -> dict[str, Any]:
    details = {
        "request_id": entry.request_id,
        "seq_id": entry.seq_id,
        "status": entry.status,
        "tokens": entry.tokens,
        "error": entry.error,
    }
    return {
        "name": entry.kind,
        "ph": "X",
        "pid": 1,
        "tid": row,
        "ts": _microseconds(entry.accepted),
        "dur": _microseconds(entry.finished or entry.accepted) - _microseconds(entry.accepted),
        "args": {name: value for name, value in details.items() if value is not None},
    }


def _microseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1e6)
