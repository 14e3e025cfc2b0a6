"""How much of something that all keys share one of them may have."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def over(own: int, others: int, more: int, most: int) -> bool:
    """Whether one who holds ``own`` of ``most`` has to wait for ``more``.

    Of what the others leave, one may take three quarters: there is always something for who comes next. Who has
    nothing yet is never kept waiting, however much it is: what is large must not wait for ever.
    """
    return own > 0 and own + more > (most - others) * 3 // 4


@dataclass
class _Queue:
    """``users``: jobs that hold or want one of the owner's places."""

    places: asyncio.Semaphore
    users: int = 0


class Workers:
    """A few threads for what takes memory or time, so that nothing else waits for it.

    Owners take turns: each has at most ``each`` jobs in the threads' own queue.
    """

    def __init__(self, name: str, *, threads: int = 2, each: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, name)
        self._each = each
        self._queues: dict[str, _Queue] = {}

    async def run(self, owner: str, job: Callable[[], T]) -> T:
        queue = self._queues.setdefault(owner, _Queue(asyncio.Semaphore(self._each)))
        queue.users += 1
        try:
            async with queue.places:
                context = contextvars.copy_context()
                return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, job)
        finally:
            queue.users -= 1
            if not queue.users:
                del self._queues[owner]


# Of this process. What else takes a thread, mostly a look into the store, shares the forty of anyio.
workers = Workers("mint-bodies")
"""Bodies that are decompressed or parsed: 256 MiB take a gigabyte meanwhile; and Python parses one at a time anyway."""
prompts = Workers("mint-prompts")
"""Prompts that are rendered and tokenised. A tokenizer has one thread in it at a time anyway."""
files = Workers("mint-files", threads=4)
"""Checkpoints that are packed or copied: no owner has more than half of the threads."""
