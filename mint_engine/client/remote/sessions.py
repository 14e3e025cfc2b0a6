"""Sessions on a server: made, kept alive, ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

from mint_engine import __version__
from mint_engine.client.remote.background import Background
from mint_engine.client.remote.transport import Transport, json_object
from mint_engine.errors import MintError

log = logging.getLogger("mint_engine.client")

BEAT_SECONDS = 10.0
WORRY_SECONDS = 120.0
_OVER = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})


class Sessions:
    """This connection's sessions and their heartbeats. Everything here runs on the loop's thread."""

    def __init__(self, transport: Transport, background: Background, beat_seconds: float = BEAT_SECONDS) -> None:
        self._transport, self._background, self._beat_seconds = transport, background, beat_seconds
        self._beating: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Future[None]] = set()

    async def create(
        self,
        tags: Sequence[str],
        user_metadata: dict[str, str] | None,
        project_id: str | None,
        display_name: str | None,
    ) -> str:
        body: dict[str, Any] = {
            "tags": list(tags), "user_metadata": user_metadata, "project_id": project_id, "display_name": display_name,
            "sdk_version": f"mint-engine {__version__}", "type": "create_session",
        }  # fmt: skip
        answer = json_object(await self._transport.post("create_session", body))
        for level, word in ((logging.INFO, "info"), (logging.WARNING, "warning"), (logging.ERROR, "error")):
            if message := answer.get(f"{word}_message"):
                log.log(level, "%s: %s", self._transport.address.url, message)
        session_id = str(answer["session_id"])
        self._beating[session_id] = self._background.spawn(self._beat(session_id))
        return session_id

    @property
    def alive(self) -> list[str]:
        """Those that have not been finished."""
        return list(self._beating)

    async def finish(
        self, session_id: str, status: str, detail: str | None, before: Callable[[], Awaitable[None]]
    ) -> None:
        """End a session after `before()`. Nothing happens if it has ended already."""
        beating = self._beating.pop(session_id, None)
        if beating is None:
            return
        left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leaving.add(left)
        try:
            await before()
            body = {"reason": {"type": status}, "detail": detail}
            await self._transport.post(f"sessions/{session_id}/finish", body, retries=2)
        except MintError as error:
            log.warning("session %s: the server was not told that it is over: %s", session_id, error)
        finally:
            beating.cancel()
            self._leaving.discard(left)
            left.set_result(None)

    async def left(self) -> None:
        """Wait for the sessions that are just being finished."""
        if self._leaving:
            await asyncio.wait(self._leaving)

    async def _beat(self, session_id: str) -> None:
        """Say every few seconds that somebody is here. Failures are made good by the next beat."""
        heard, worried = time.monotonic(), False
        body = {"session_id": session_id, "type": "session_heartbeat"}
        while True:
            await asyncio.sleep(self._beat_seconds)
            try:
                response = await self._transport.post(
                    "session_heartbeat", body, retries=0, timeout=self._beat_seconds, expect_status=_OVER
                )
            except MintError as error:
                if time.monotonic() - heard > WORRY_SECONDS and not worried:
                    worried = True
                    log.warning("session %s: no heartbeat answered for %.0f s: %s", session_id, WORRY_SECONDS, error)
                continue
            if response.status_code in _OVER:
                log.warning("session %s is over, says the server", session_id)
                return
            heard, worried = time.monotonic(), False
