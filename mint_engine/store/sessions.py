"""Sessions and the samplers made in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Row, insert, select, update

from mint_engine.errors import NotFoundError, UserError
from mint_engine.store import schema
from mint_engine.store.base import StoreBase, unique
from mint_engine.store.names import check_id, check_page, check_scope, check_text, now
from mint_engine.types import (
    AccessScope,
    FinishReason,
    GetSamplerResponse,
    GetSessionResponse,
    ListSessionsResponse,
)

_sessions, _samplers, _runs = schema.sessions, schema.samplers, schema.runs
_REASONS = ("success", "errored", "interrupted")


class Sessions(StoreBase):
    def create_session(
        self,
        session_id: str,
        *,
        tags: Sequence[str] = (),
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        display_name: str | None = None,
    ) -> None:
        check_id(session_id, "session_id")
        check_text(project_id, "project_id")
        check_text(display_name, "display_name")
        row = {
            "session_id": session_id,
            "owner": self.owner,
            "created": now(),
            "tags": list(tags),
            "user_metadata": None if user_metadata is None else dict(user_metadata),
            "project_id": project_id,
            "display_name": display_name,
        }
        with unique("session_id", session_id), self._database.write(f"creating session {session_id}") as connection:
            connection.execute(insert(_sessions).values(row))

    def update_session(
        self, session_id: str, *, project_id: str | None = None, display_name: str | None = None
    ) -> None:
        """Change what is given."""
        check_text(project_id, "project_id")
        check_text(display_name, "display_name")
        given = {"project_id": project_id, "display_name": display_name}
        self._change_session(session_id, {key: value for key, value in given.items() if value is not None})

    def finish_session(self, session_id: str, status: FinishReason, detail: str | None = None) -> None:
        """The client said that it is done, and how it went."""
        if status not in _REASONS:
            raise UserError(f"status: expected one of {', '.join(_REASONS)}, got {status!r}")
        check_text(detail, "detail")
        self._change_session(session_id, {"finished": status, "finish_detail": detail})

    def session_finished(self, session_id: str) -> bool:
        """Whether the client has said that it is done. Raises NotFoundError."""
        with self._database.read() as connection:
            return self._session(connection, session_id).finished is not None

    def session_owner(self, session_id: str) -> str:
        """Whose session it is; for the engine, which serves all owners."""
        check_id(session_id, "session_id")
        with self._database.read() as connection:
            query = select(_sessions.c.owner).where(_sessions.c.session_id == session_id)
            owner = connection.execute(query).scalar()
        if owner is None:
            raise NotFoundError(f"session_id: there is no session {session_id!r}")
        return owner

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> ListSessionsResponse:
        """Session ids, newest first. Sessions cannot be published: both scopes mean one's own."""
        check_page(limit, offset)
        check_scope(access_scope)
        query = (
            select(_sessions.c.session_id)
            .where(_sessions.c.owner == self.owner)
            .order_by(_sessions.c.created.desc(), _sessions.c.session_id.desc())
        )
        with self._database.read() as connection:
            found = connection.execute(query.limit(limit).offset(offset)).scalars()
            return ListSessionsResponse(sessions=list(found))

    def get_session(self, session_id: str, access_scope: AccessScope = "owned") -> GetSessionResponse:
        check_scope(access_scope)
        with self._database.read() as connection:
            session = self._session(connection, session_id)
            runs = select(_runs.c.run_id).where(_runs.c.session_id == session_id)
            samplers = select(_samplers.c.sampler_id).where(_samplers.c.session_id == session_id)
            return GetSessionResponse(
                training_run_ids=list(connection.execute(runs.order_by(_runs.c.created, _runs.c.run_id)).scalars()),
                sampler_ids=list(
                    connection.execute(samplers.order_by(_samplers.c.created, _samplers.c.sampler_id)).scalars()
                ),
                user_metadata=session.user_metadata,
                display_name=session.display_name,
            )

    def add_sampler(
        self,
        session_id: str,
        sampler_id: str,
        *,
        base_model: str,
        model_path: str | None = None,
        ephemeral: bool = False,
    ) -> None:
        """`ephemeral`: of weights that were never saved, so that this record alone cannot bring it back."""
        check_id(sampler_id, "sampler_id")
        check_text(base_model, "base_model")
        check_text(model_path, "model_path")
        row = {
            "sampler_id": sampler_id,
            "session_id": session_id,
            "created": now(),
            "base_model": base_model,
            "model_path": model_path,
            "ephemeral": ephemeral,
        }
        with unique("sampler_id", sampler_id), self._database.write(f"recording sampler {sampler_id}") as connection:
            self._session(connection, session_id)
            connection.execute(insert(_samplers).values(row))

    def get_sampler(self, sampler_id: str) -> GetSamplerResponse:
        row = self._sampler(sampler_id)
        return GetSamplerResponse(sampler_id=row.sampler_id, base_model=row.base_model, model_path=row.model_path)

    def is_ephemeral(self, sampler_id: str) -> bool:
        """Whether the sampler's weights were never saved; for the engine, which may have lost them."""
        return bool(self._sampler(sampler_id).ephemeral)

    def _sampler(self, sampler_id: str) -> Row:
        check_id(sampler_id, "sampler_id")
        query = (
            select(_samplers)
            .join(_sessions, _sessions.c.session_id == _samplers.c.session_id)
            .where(_samplers.c.sampler_id == sampler_id, _sessions.c.owner == self.owner)
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(f"sampler_id: there is no sampler {sampler_id!r}")
        return row

    def _change_session(self, session_id: str, changes: Mapping[str, str | None]) -> None:
        with self._database.write(f"updating session {session_id}") as connection:
            self._session(connection, session_id)
            if changes:
                of = _sessions.c.session_id == session_id
                connection.execute(update(_sessions).where(of).values(**changes))
