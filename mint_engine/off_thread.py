"""Threads for what must not hold up the device's own: disk, a load, the user's loss."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mint_engine.kernels.op import without_team

THREADS = 4  # calls run at once, beside those that have a thread each


@dataclass(frozen=True)
class Apart:
    """A call that gets a thread of its own: the user's code, or a wait for something long that others wait for, too.

    On the few threads it would hold up everybody's disk work, for ever where it waits for such work itself.
    """

    call: Callable[[], Any]

    def __call__(self) -> Any:
        return self.call()


class OffThread:
    """Runs calls, which must not raise, in the order of ``put`` on a few threads, or each on one of its own.

    They are daemon threads of our own: those of concurrent.futures are gone before an exit handler can drain a queue.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._apart: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-io-{i}", daemon=True) for i in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, call: Callable[[], None], *, apart: bool = False) -> None:
        if not apart:
            self._calls.put(call)
            return
        thread = threading.Thread(target=_run, args=(call,), name=f"{self._name}-apart", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            self._calls.put(call)
        else:
            self._apart.add(thread)

    def close(self) -> None:
        """Do what was put, and end the threads."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in [*self._threads, *self._apart]:
            if thread is not threading.current_thread():
                thread.join()

    def _serve(self) -> None:
        without_team()
        while (call := self._calls.get()) is not None:
            call()
            del call  # it holds the future and its result, and this thread may sleep long


def _run(call: Callable[[], None]) -> None:
    without_team()
    call()
