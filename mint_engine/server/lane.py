"""The order of one model's operations: reordering by seq_id, deduplication, gaps. No clock and no loop in here.

The rules (wire-protocol.md 2.6): ids count up by one; a request may come before its predecessors; one that comes twice
is one operation; one that was refused has used up its id.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from mint_engine.errors import UserError
from mint_engine.server.promises import Promise

FARTHEST = 1 << 20
"""How far ahead of the next id another may be: no client has so many requests on their way."""
MOST_WAITING = 1024
"""Operations of a model that wait for an id that has not come. Each look at them costs a little time."""
REMEMBERED = 512
"""Answered ids kept: a client does not go on before it has its answer, so a retry is never far behind."""


@dataclass(eq=False, slots=True)
class Operation:
    """``start`` hands it to the engine. ``saved``: its request as bytes, to do it after a restart; None: it cannot."""

    promise: Promise
    start: Callable[[], Future]
    saved: Callable[[], bytes] | None = None


class Lane:
    """Operations come in by `add` and `refuse` in any order and go out by `ready` in theirs.

    next_seq: the id that has to come next. Creating the model is 0, so a model from elsewhere begins with 1.
    """

    def __init__(self, model_id: str, owner: str, next_seq: int = 1) -> None:
        self.model_id, self.owner, self.next_seq = model_id, owner, next_seq
        self.answered: OrderedDict[int, str] = OrderedDict()
        self.by_key: OrderedDict[str, str] = OrderedDict()  # idempotency key -> request id, where there is no seq_id
        self.started: deque[Operation] = deque()  # with the engine, in order; done ones leave at the front
        self.unsettled: set[Promise] = set()
        self._early: dict[int, Operation | None] = {}  # None: refused
        self._unnumbered: deque[tuple[int, Operation]] = deque()  # (runs after this id, operation)

    def request_of(self, seq_id: int | None, key: str | None = None) -> str | None:
        """The request id that this request was answered, if it has been here before.

        ``key``: the client's idempotency key, which counts where there is no seq_id.
        """
        if seq_id is not None:
            return self.answered.get(seq_id)
        return None if key is None else self.by_key.get(key)

    def check(self, seq_id: int) -> None:
        """Raises UserError for an id that is used up: no new request can have it."""
        if seq_id < self.next_seq:
            raise UserError(
                f"seq_id: {seq_id} of {self.model_id} is past (refused, given up, or answered long ago); the next is "
                f"{self.next_seq}"
            )
        if seq_id in self._early:
            raise UserError(f"seq_id: the request {seq_id} of {self.model_id} was refused before")
        if seq_id > self.next_seq + FARTHEST:
            raise UserError(f"seq_id: {seq_id} of {self.model_id} is far ahead; the next is {self.next_seq}")

    def add(self, operation: Operation, key: str | None = None) -> None:
        """Take an operation; its promise's ``seq_id`` None means after everything that has come so far."""
        seq_id = operation.promise.seq_id
        self.unsettled.add(operation.promise)
        if key is not None:
            self.by_key[key] = operation.promise.request_id
            while len(self.by_key) > REMEMBERED:
                self.by_key.popitem(last=False)
        if seq_id is None:
            self._unnumbered.append((max(self._early, default=self.next_seq - 1), operation))
            return
        self._early[seq_id] = operation
        self.answered[seq_id] = operation.promise.request_id
        while len(self.answered) > REMEMBERED + len(self._early):
            del self.answered[next(i for i in self.answered if i not in self._early)]  # who waits may ask again

    def refuse(self, seq_id: int) -> None:
        """A request with this id was answered 4xx: nobody waits for it."""
        near = self.next_seq <= seq_id <= self.next_seq + FARTHEST
        if near and seq_id not in self._early and (seq_id == self.next_seq or not self.crowded):
            self._early[seq_id] = None

    def ready(self) -> Iterator[Operation]:
        """Take out what may start now, in order."""
        while True:
            if self._unnumbered and self._unnumbered[0][0] < self.next_seq:
                yield self._unnumbered.popleft()[1]
            elif self.next_seq in self._early:
                operation = self._early.pop(self.next_seq)
                self.next_seq += 1
                if operation is not None:
                    yield operation
            else:
                return

    @property
    def missing(self) -> int | None:
        """The id that has not come although later ones have."""
        return self.next_seq if self.waiting else None

    @property
    def crowded(self) -> bool:
        """Whether as many wait as may."""
        return len(self._early) + len(self._unnumbered) >= MOST_WAITING

    @property
    def refused(self) -> list[int]:
        """Ids that are used up and lie behind a missing one."""
        return [seq_id for seq_id, operation in self._early.items() if operation is None]

    @property
    def waiting(self) -> list[Operation]:
        """What has come and cannot start yet, in order."""
        numbered = [(seq_id, 0, operation) for seq_id, operation in self._early.items() if operation is not None]
        behind = [(seq_id, 1 + i, operation) for i, (seq_id, operation) in enumerate(self._unnumbered)]
        return [operation for _, _, operation in sorted([*numbered, *behind], key=lambda entry: entry[:2])]

    def give_up(self) -> list[Operation]:
        """Take out all that waits for an id that will not come any more; their ids are used up."""
        operations = self.waiting
        self.next_seq = max(self._early, default=self.next_seq - 1) + 1
        self._early.clear()
        self._unnumbered.clear()
        return operations

    def settled(self, promise: Promise) -> None:
        """One of the operations is done."""
        self.unsettled.discard(promise)
        while self.started and self.started[0].promise.done:
            self.started.popleft()
