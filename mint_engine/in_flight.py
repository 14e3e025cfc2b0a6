"""What a device has been given and has not done: the thread that waits for it, so that the device's own need not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

from mint_engine.pending import Pending

Then = Callable[[BaseException | None], None]


class InFlight:
    """Waits for pending operations in their order and hands each on, with the error of the wait if there was one.

    ``resume`` takes a function that is to be called on the device's thread, where ``add`` and ``len`` belong too. The
    thread that waits begins with the first operation: on a CPU there is none.
    """

    def __init__(self, name: str, resume: Callable[[Callable[[], None]], None]) -> None:
        self._name, self._resume, self._count = name, resume, 0
        self._waiting: queue.SimpleQueue[tuple[Pending, Then] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Operations added and not handed on."""
        return self._count

    def add(self, pending: Pending, then: Then) -> None:
        """Call ``then`` on the device's thread once the device has done ``pending``."""
        self._count += 1
        self._waiting.put((pending, then))
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name=f"{self._name}-in-flight", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread. Nothing may be in flight."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    def _wait(self) -> None:
        while (item := self._waiting.get()) is not None:
            pending, then = item
            error: BaseException | None = None
            try:
                pending.wait()
            except BaseException as failure:
                error = failure
            self._resume(partial(self._hand_on, then, error))
            del item, pending, then, error  # they hold futures and results, and this thread may sleep long

    def _hand_on(self, then: Then, error: BaseException | None) -> None:
        self._count -= 1
        then(error)
