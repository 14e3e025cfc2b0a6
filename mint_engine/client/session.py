"""A session as its clients hold it: it lives as long as one of them does."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mint_engine.client.protocol import ClientEngine


class Session:
    """When the last client of a session is gone a server is told so, and hears no more heartbeats of it."""

    def __init__(self, engine: ClientEngine, session_id: str) -> None:
        self.session_id = session_id
        weakref.finalize(self, engine.release, session_id).atexit = False
