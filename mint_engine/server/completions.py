"""What `retrieve_futures` answers: which samples of one sampling client have ended since it last asked."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from mint_engine.server.waiting import Bell

if TYPE_CHECKING:
    from mint_engine.server.promises import Promise

CLONE = 1_000_000_000
"""seq_ids of the copies of a sampling client differ by this much."""


class Completions:
    """A list that grows at one end and is trimmed at the other by what the client has seen.

    Positions begin at the time in microseconds, so those of a restarted server lie behind those of the one before.
    """

    def __init__(self) -> None:
        self._next = time.time_ns() // 1000
        self._promises: deque[tuple[int, Promise]] = deque()
        self._bell = Bell()

    def add(self, promise: Promise) -> None:
        self._promises.append((self._next, promise))
        self._next += 1
        self._bell.ring()

    def ring(self) -> None:
        self._bell.ring()

    async def after(self, cursor: int, timeout: float) -> tuple[list[Promise], int]:
        """What has ended behind ``cursor``, waited for if there is nothing yet, and the cursor for the next time."""
        while self._promises and self._promises[0][0] <= cursor:
            self._promises.popleft()
        if not self._promises and timeout > 0:
            await self._bell.wait(timeout)
        found = [promise for position, promise in self._promises if position > cursor]
        return found, self._promises[-1][0] if found else cursor
