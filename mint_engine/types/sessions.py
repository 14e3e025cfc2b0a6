"""Searching sessions: what may be asked, and what comes back."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import AwareDatetime, Field

from mint_engine.types.base import ResponseModel

FinishReason: TypeAlias = Literal["success", "errored", "interrupted"]

# A request comes from SDKs that may know more than we do: like an answer, it ignores unknown fields.


class OwnSearchOwner(ResponseModel):
    """The caller's own sessions."""

    type: Literal["own"] = "own"


class AccessibleSearchOwner(ResponseModel):
    """Every session the caller may see."""

    type: Literal["accessible"] = "accessible"


class UserSearchOwner(ResponseModel):
    """Sessions of these owners."""

    type: Literal["user"] = "user"
    owner_urns: list[str] = Field(min_length=1, max_length=10)


SearchOwner: TypeAlias = Annotated[
    OwnSearchOwner | AccessibleSearchOwner | UserSearchOwner, Field(discriminator="type")
]


class SessionStatusQuery(ResponseModel):
    """`reasons` narrows down `client_finished`; None matches every reason."""

    type: Literal["active", "cancelled", "failed", "client_finished"] = "active"
    reasons: list[FinishReason] | None = Field(default=None, min_length=1)


class SessionSearchCursor(ResponseModel):
    """Where the next page starts."""

    last_created_at: AwareDatetime
    last_session_id: str


class SessionSearchRequest(ResponseModel):
    """What to look for; every condition that is given must hold, except that `session_id` or `display_name` is enough.

    display_name: words, each somewhere in the name, in any case. user_metadata: exact pairs, all of them.
    """

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    display_name: str | None = Field(default=None, min_length=1)
    owner: SearchOwner = Field(default_factory=OwnSearchOwner)
    statuses: list[SessionStatusQuery] | None = Field(default=None, min_length=1)
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SessionSearchCursor | None = None


class SessionFinishReason(ResponseModel):
    type: FinishReason = "success"


class SessionStatus(ResponseModel):
    """`active`, or `client_finished` with the reason and the detail the client gave."""

    type: Literal["active", "client_finished"] = "active"
    reason: SessionFinishReason | None = None
    detail: str | None = None


class SessionSummary(ResponseModel):
    """A session as a search shows it. `project_id` is empty where there is no project."""

    session_id: str
    created_at: datetime
    owner: str
    project_id: str = ""
    status: SessionStatus | None = None
    checkpoints_count: int = 0
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


class SessionSearchResponse(ResponseModel):
    """One page, newest first. `next_cursor` is None on the last one."""

    sessions: list[SessionSummary]
    next_cursor: SessionSearchCursor | None = None
