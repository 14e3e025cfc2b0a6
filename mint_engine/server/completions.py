"""What `retrieve_futures` answers: which samples of one sampling client have ended since it last asked."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from mint_engine.server.waiting import Bell

if TYPE_CHECKING:
    from collections.abc import Callable

    from mint_engine.server.promises import Promise

CLONE = 1_000_000_000
"""seq_ids of the copies of a sampling client differ by this much."""
_MOST = 1 << 14  # a client that asks has a thousand or so on their way


class Completions:
    """A list that grows at one end and is trimmed at the other by what the client has seen.

    Positions begin at the time in microseconds, so those of a restarted server lie behind those of the one before. Only
    the ids are kept, so that nobody's asking keeps results longer than `Promises` does.

    Args:
        find: the promise of an id, if it is still known.
    """

    def __init__(self, find: Callable[[str], Promise | None]) -> None:
        self._find = find
        self._next = time.time_ns() // 1000
        self._ended: deque[tuple[int, str]] = deque(maxlen=_MOST)
        self._bell = Bell()

    def add(self, promise: Promise) -> None:
        self._ended.append((self._next, promise.request_id))
        self._next += 1
        self._bell.ring()

    def ring(self) -> None:
        self._bell.ring()

    async def after(self, cursor: int, timeout: float) -> tuple[list[Promise], int]:
        """What has ended behind ``cursor``, waited for if there is nothing yet, and the cursor for the next time."""
        while self._ended and self._ended[0][0] <= cursor:
            self._ended.popleft()
        if not self._ended and timeout > 0:
            await self._bell.wait(timeout)
        news = [entry for entry in self._ended if entry[0] > cursor]
        found = [promise for _, request_id in news if (promise := self._find(request_id)) is not None]
        return found, news[-1][0] if news else cursor
