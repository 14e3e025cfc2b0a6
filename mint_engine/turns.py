"""A queue in which owners take turns, so that nobody who asks for much keeps the others waiting."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Each owner's items keep their order; one is taken of every owner in turn."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()  # whose turn it is first
        self._count = 0

    def append(self, owner: str, item: T) -> None:
        self._queues.setdefault(owner, deque()).append(item)
        self._count += 1

    def put_back(self, owner: str, item: T, before: Callable[[T], bool]) -> None:
        """Queue an item that has had its turn, in front of the first of its owner's that it comes ``before``."""
        queue = self._queues.setdefault(owner, deque())
        queue.insert(next((i for i, other in enumerate(queue) if before(other)), len(queue)), item)
        self._count += 1

    def first(self) -> T:
        """The next item, which stays."""
        return next(iter(self._queues.values()))[0]

    def pop(self) -> T:
        """Take the next item; its owner's next comes after one of every other owner."""
        owner, queue = next(iter(self._queues.items()))
        item = queue.popleft()
        self._count -= 1
        self._queues.move_to_end(owner)
        if not queue:
            del self._queues[owner]
        return item

    def skip(self) -> None:
        """Let the next owner go first."""
        self._queues.move_to_end(next(iter(self._queues)))

    def discard(self, owner: str, item: T) -> None:
        """Take an item out, if it is there."""
        queue = self._queues.get(owner)
        if queue is not None and item in queue:
            queue.remove(item)
            self._count -= 1
            if not queue:
                del self._queues[owner]

    def clear(self) -> None:
        self._queues.clear()
        self._count = 0

    def of(self, owner: str) -> int:
        """How many items of an owner's wait."""
        return len(self._queues.get(owner, ()))

    @property
    def owners(self) -> int:
        """How many owners have something waiting."""
        return len(self._queues)

    def in_turn(self) -> Iterator[T]:
        """All items in the order in which they would be popped."""
        for round_ in zip_longest(*self._queues.values(), fillvalue=None):
            yield from (item for item in round_ if item is not None)

    def __iter__(self) -> Iterator[T]:
        for queue in self._queues.values():
            yield from queue

    def __len__(self) -> int:
        return self._count
