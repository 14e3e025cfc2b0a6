"""Sessions: whose they are, and which of them are still alive.

A session that has not been heard of for a while is not dead for good: its models and samplers go to disk, and the next
request brings them back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from mint_engine.errors import NotFoundError, UserError

if TYPE_CHECKING:
    from mint_engine.server.caller import Caller

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Session:
    owner: str
    seen: float
    finished: bool | None = None  # None: not known yet, the store does
    timer: asyncio.TimerHandle | None = None


class Sessions:
    """Args:
    silence: seconds without a sign of life after which ``put_aside`` is called with a session's id.
    put_aside: moves what the session has in memory to disk; False if some of it is busy.
    """

    def __init__(self, silence: float, put_aside: Callable[[str], Awaitable[bool]]) -> None:
        self._silence, self._put_aside = silence, put_aside
        self._sessions: dict[str, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def check(self, caller: Caller, session_id: str, *, making: bool = False) -> Session:
        """The session, which is heard of herewith.

        Raises:
            NotFoundError: it does not exist, or is another's.
            UserError: something is to be made in it (``making``), and it is finished.
        """
        session = self._sessions.get(session_id)
        if session is not None and session.owner != caller.owner:
            raise NotFoundError(f"session_id: there is no session {session_id!r}")
        if session is None or session.finished is None:
            finished = await run_in_threadpool(caller.store.session_finished, session_id)
            self.touch(session_id, caller.owner)
            session = self._sessions[session_id]
            session.finished = session.finished or finished
        if making and session.finished:
            raise UserError(f"session_id: session {session_id!r} is finished")
        session.seen = time.monotonic()
        return session

    def touch(self, session_id: str, owner: str) -> None:
        """A sign of life of a session that is known to exist."""
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = Session(owner, time.monotonic())
            self._set_timer(session_id, session, self._silence)
        session.seen = time.monotonic()

    async def finish(self, caller: Caller, session_id: str, then: Coroutine[Any, Any, None]) -> None:
        """The client is done. ``then`` runs after the answer."""
        session = await self.check(caller, session_id)
        session.finished = True
        self._keep(then)

    def _set_timer(self, session_id: str, session: Session, seconds: float) -> None:
        session.timer = asyncio.get_running_loop().call_later(seconds, self._look, session_id, session)

    def _look(self, session_id: str, session: Session) -> None:
        silent = time.monotonic() - session.seen
        if silent < self._silence:
            self._set_timer(session_id, session, self._silence - silent)
        else:
            self._keep(self._silent(session_id, session))

    async def _silent(self, session_id: str, session: Session) -> None:
        log.info("session %s has been silent for %.0f s", session_id, time.monotonic() - session.seen)
        try:
            idle = await self._put_aside(session_id)
        except Exception:
            log.exception("session %s could not be put aside", session_id)
            idle = False
        if idle and time.monotonic() - session.seen >= self._silence:
            self._sessions.pop(session_id, None)
        else:
            self._set_timer(session_id, session, self._silence)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
