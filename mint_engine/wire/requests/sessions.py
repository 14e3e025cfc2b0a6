"""Configuration, sessions, and what a client reports about itself."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from mint_engine import types
from mint_engine.types.sessions import FinishReason
from mint_engine.wire.requests.base import Metadata, Name, WireRequest, without_nulls


class ClientConfigRequest(WireRequest):
    """`POST client/config` and `client/dynamic_config`."""

    sdk_version: str = ""


class AuthTokenRequest(WireRequest):
    """`POST auth/token`: the key is in a header."""


class CreateSessionRequest(WireRequest):
    """`POST create_session`."""

    tags: list[Name] = Field(default_factory=list, max_length=256)
    user_metadata: Metadata | None = None
    sdk_version: str = ""
    project_id: Name | None = None
    display_name: Name | None = None


class SessionHeartbeatRequest(WireRequest):
    """`POST session_heartbeat`."""

    session_id: Name


class Finish(WireRequest):
    type: FinishReason


class FinishSessionRequest(WireRequest):
    """`POST sessions/{id}/finish`."""

    reason: Finish
    detail: Annotated[str, Field(max_length=65536)] | None = None

    @property
    def status(self) -> FinishReason:
        return self.reason.type


class TelemetryRequest(WireRequest):
    """`POST telemetry`: read for its size, not for its content."""

    events: list[Any] = Field(default_factory=list)
    session_id: str | None = None


class SessionSearchRequest(types.SessionSearchRequest):
    """`POST sessions/search`: what the store takes, with the manners of a request."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return without_nulls(values)

    @model_validator(mode="after")
    def _storable(self) -> SessionSearchRequest:
        texts = [self.session_id, self.display_name, *(self.project_ids or []), *getattr(self.owner, "owner_urns", [])]
        texts += [*self.user_metadata, *self.user_metadata.values(), self.cursor and self.cursor.last_session_id]
        if any(text and "\0" in text for text in texts):
            raise ValueError("expected text without NUL characters")
        return self


class AssignProjectRequest(WireRequest):
    """`PUT sessions/{id}/project`."""

    project_id: Name | None = None
