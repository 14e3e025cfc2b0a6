"""What the device thread runs: operations, and operations that can be done together with others in one go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from mint_engine.pending import Pending


class Joint(ABC):
    """An operation that may run together with others that are next in their lanes.

    It is known by identity: two with the same contents are two. ``patience``: seconds it may wait for those whose last
    answer has only just been given, and who may ask again.
    """

    patience = 0.0

    @abstractmethod
    def choose(self, others: Sequence[Joint]) -> Sequence[Joint]:
        """Which of ``others``, given in the order of their turns, are to run with this one. Quick, and never raises."""

    @abstractmethod
    def run(self, company: Sequence[Joint]) -> Sequence[Any | BaseException] | Pending[Sequence[Any | BaseException]]:
        """Do this one and what it chose; the result or the exception of each, this one's first.

        Or queue them on a device, which gives these later.
        """


# A function, which may answer with what it queued on a device. Or a generator function that yields callables to be run
# off the device thread (disk; the user's own loss or a load, `Apart`) and receives their results; while it waits its
# model stands still, the device does not. Or one to be run in company.
Operation: TypeAlias = Callable[[], Any] | Joint


@dataclass(frozen=True)
class Queued:
    """``brief``: a plain function that is over, or queued, in milliseconds, which company may wait for."""

    operation: Operation
    future: Future
    brief: bool = False
