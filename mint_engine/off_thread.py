"""Threads for what must not hold up the device's own: disk, the user's loss."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from mint_engine.kernels.op import without_team

THREADS = 4  # calls run at once


class OffThread:
    """Runs calls, which must not raise, in the order of ``put`` on a few threads.

    They are daemon threads of our own: those of concurrent.futures are gone before an exit handler can drain a queue.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-io-{i}", daemon=True) for i in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def close(self) -> None:
        """Do what was put, and end the threads."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _serve(self) -> None:
        without_team()
        while (call := self._calls.get()) is not None:
            call()
            del call  # it holds the future and its result, and this thread may sleep long
