"""The operations that wait for one model, and which of them may be next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice

from mint_engine.joint import Joint, Operation, Queued
from mint_engine.turns import Turns

BRIEF_ONES = 2  # of one lane that go before their turn: many brief ones are not brief


class Lane:
    """The operations of one model, run in the order of the calls. Of several callers each has its turn.

    ``enqueue``: the executor's. ``owner``: whose turn the lane takes.
    """

    def __init__(self, enqueue: Callable[[Lane, Operation, bool, str], Future], owner: str = "") -> None:
        self._enqueue, self.owner = enqueue, owner
        self.waiting: Turns[Queued] = Turns()
        self.busy = False  # it has its turn, or waits for it
        self.in_flight: list[Joint | None] = []  # operations that a device is at; None: a brief one

    @property
    def may_start(self) -> bool:
        """Whether the next operation may. Of two optimiser steps the second needs to know what came of the first."""
        if not self.waiting or not self.in_flight:
            return bool(self.waiting)
        queued = self.waiting.first()
        return isinstance(queued.operation, Joint) or (queued.brief and None not in self.in_flight)

    def submit(self, operation: Operation, *, brief: bool = False, caller: str = "") -> Future:
        """Queue an operation. Its result or its exception reaches exactly the future returned here.

        ``caller``: who takes turns with the other callers of the same lane.
        """
        return self._enqueue(self, operation, brief, caller)

    def next_joint(self) -> Joint | None:
        """The operation that is next, after brief ones, if it can run in company."""
        near = islice(self.waiting.in_turn(), BRIEF_ONES + 1)
        queued = next((q for q in near if not q.brief), None)
        return queued.operation if queued is not None and isinstance(queued.operation, Joint) else None
