"""How much of something that all keys share one of them may have."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

_WORKERS = 2  # a body of 256 MiB takes a gigabyte while it is parsed; and Python parses one at a time anyway


def over(own: int, others: int, more: int, most: int) -> bool:
    """Whether one who holds ``own`` of ``most`` has to wait for ``more``.

    Of what the others leave, one may take three quarters: there is always something for who comes next. Who has
    nothing yet is never kept waiting, however much it is: what is large must not wait for ever.
    """
    return own > 0 and own + more > (most - others) * 3 // 4


@dataclass
class _Queue:
    """``users``: jobs that hold or want one of the owner's places."""

    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_WORKERS))
    users: int = 0


class Workers:
    """Two threads for what takes memory and time: bodies that are decompressed or parsed, results that are encoded.

    So the memory is bounded that bodies take while they are read, however many come at once. Owners take turns: each
    has at most two jobs in the threads' own queue.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_WORKERS, "mint-bodies")
        self._queues: dict[str, _Queue] = {}

    async def run(self, owner: str, job: Callable[[], T]) -> T:
        queue = self._queues.setdefault(owner, _Queue())
        queue.users += 1
        try:
            async with queue.places:
                context = contextvars.copy_context()
                return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, job)
        finally:
            queue.users -= 1
            if not queue.users:
                del self._queues[owner]


workers = Workers()
"""Of this process."""
