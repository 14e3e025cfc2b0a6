"""Who is asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from mint_engine.server.gate import admit

if TYPE_CHECKING:
    from mint_engine.store import KeyRecord, Store


@dataclass(frozen=True)
class Caller:
    """The holder of a key, or whoever is on this machine when no keys are configured.

    owner: the key's id, or "local". store: what that owner may see. key: None without keys.
    """

    owner: str
    store: Store
    key: KeyRecord | None = None


async def get_caller(request: Request) -> Caller:
    """FastAPI dependency. Raises HTTP 401 for a missing, wrong or revoked key."""
    return await admit(request.scope)
