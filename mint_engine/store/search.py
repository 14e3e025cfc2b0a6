"""Searching one's sessions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, Row, Select, and_, func, or_, select

from mint_engine.errors import UserError
from mint_engine.store import schema
from mint_engine.store.base import StoreBase
from mint_engine.types.sessions import (
    SessionFinishReason,
    SessionSearchCursor,
    SessionSearchRequest,
    SessionSearchResponse,
    SessionStatus,
    SessionSummary,
    UserSearchOwner,
)

_sessions, _runs, _checkpoints = schema.sessions, schema.runs, schema.checkpoints
_CHUNK = 200


class Search(StoreBase):
    def search_sessions(self, request: SessionSearchRequest | Mapping[str, Any]) -> SessionSearchResponse:
        """One page of the sessions that fit, newest first. Sessions cannot be published: one finds one's own."""
        if not isinstance(request, SessionSearchRequest):
            request = _parse(request)
        if isinstance(request.owner, UserSearchOwner) and self.owner not in request.owner.owner_urns:
            return SessionSearchResponse(sessions=[])
        with self._database.read() as connection:
            found, more = self._find(connection, request)
            sizes = self._sizes(connection, [row.session_id for row in found])
        cursor = None
        if more:
            last = found[-1]
            cursor = SessionSearchCursor(last_created_at=last.created, last_session_id=last.session_id)
        summaries = [_summary(row, *sizes.get(row.session_id, (0, 0))) for row in found]
        return SessionSearchResponse(sessions=summaries, next_cursor=cursor)

    def _find(self, connection: Connection, request: SessionSearchRequest) -> tuple[list[Row], bool]:
        """The rows of the page, and whether there are more."""
        found: list[Row] = []
        after: tuple[datetime, str] | None = None
        if request.cursor is not None:
            after = request.cursor.last_created_at, request.cursor.last_session_id
        while True:
            rows = connection.execute(self._query(request, after).limit(_CHUNK)).all()
            for row in rows:
                # In Python: words in any case and keys with any characters are no matter for portable SQL.
                if _fits(row, request):
                    if len(found) == request.limit:
                        return found, True
                    found.append(row)
            if len(rows) < _CHUNK:
                return found, False
            after = (rows[-1].created, rows[-1].session_id)

    def _query(self, request: SessionSearchRequest, after: tuple[datetime, str] | None) -> Select:
        table = _sessions.c
        query = select(_sessions).where(table.owner == self.owner)
        if after is not None:
            created, session_id = after
            query = query.where(
                or_(table.created < created, and_(table.created == created, table.session_id < session_id))
            )
        return query.order_by(table.created.desc(), table.session_id.desc())

    def _sizes(self, connection: Connection, session_ids: list[str]) -> dict[str, tuple[int, int]]:
        """How many checkpoints each session has, and how many bytes."""
        query = (
            select(_runs.c.session_id, func.count(), func.sum(_checkpoints.c.size_bytes))
            .join(_runs, _runs.c.run_id == _checkpoints.c.run_id)
            .where(self._visible(False), _runs.c.session_id.in_(session_ids))
            .group_by(_runs.c.session_id)
        )
        return {session_id: (int(count), int(size)) for session_id, count, size in connection.execute(query)}


def _parse(request: Mapping[str, Any]) -> SessionSearchRequest:
    try:
        return SessionSearchRequest.model_validate(request)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _fits(row: Row, request: SessionSearchRequest) -> bool:
    if request.project_ids is not None and (row.project_id or "") not in request.project_ids:
        return False
    metadata = row.user_metadata or {}
    if any(metadata.get(key) != value for key, value in request.user_metadata.items()):
        return False
    if request.statuses is not None and not any(_has_status(row, s.type, s.reasons) for s in request.statuses):
        return False
    if request.session_id is None and request.display_name is None:
        return True
    name = (row.display_name or "").casefold()
    words = (request.display_name or "").casefold().split()
    return row.session_id == request.session_id or (bool(words) and all(word in name for word in words))


def _has_status(row: Row, status: str, reasons: list[Any] | None) -> bool:
    if row.finished is None:
        return status == "active"
    return status == "client_finished" and (reasons is None or row.finished in reasons)


def _summary(row: Row, count: int, size: int) -> SessionSummary:
    status = SessionStatus()
    if row.finished is not None:
        reason = SessionFinishReason(type=row.finished)
        status = SessionStatus(type="client_finished", reason=reason, detail=row.finish_detail)
    return SessionSummary(
        session_id=row.session_id,
        created_at=row.created,
        owner=row.owner,
        project_id=row.project_id or "",
        status=status,
        checkpoints_count=count,
        display_name=row.display_name,
        user_metadata=row.user_metadata,
        checkpoint_storage_bytes=size,
    )
