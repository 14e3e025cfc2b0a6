"""From the device thread to the event loop, token by token."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """`put` from any thread; one coroutine iterates. However many items come at once, the loop is woken once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._ready = asyncio.Event()
        self._woken = False
        self._closed = False

    def put(self, item: T) -> None:
        self._items.append(item)
        self._wake()

    def close(self) -> None:
        """The iteration ends after what has been put. From any thread; what is put later may be lost."""
        self._closed = True
        with suppress(RuntimeError):  # the loop has been closed: nobody iterates any more
            self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._rouse)

    def _rouse(self) -> None:
        self._woken = False  # first: what is put from here on wakes the loop again
        self._ready.set()

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            self._ready.clear()
            closed = self._closed  # read before the items
            while self._items:
                yield self._items.popleft()
            if closed:
                return
            await self._ready.wait()
