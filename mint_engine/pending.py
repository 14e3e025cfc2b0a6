"""Work that a device has been given and has not done yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Pending(Generic[T_co]):
    """An operation queued on a device behind all that was queued before: whatever is queued next finds it done.

    ``wait`` returns when the device has come so far, on any thread. After it ``finish``, once and on the device's
    thread, makes the answer of what came back, or raises why there is none. Pending operations are finished in the
    order in which they were queued.
    """

    wait: Callable[[], None]
    finish: Callable[[], T_co]

    def result(self) -> T_co:
        """Wait here and finish."""
        self.wait()
        return self.finish()


def joined(parts: Sequence[Sequence[T] | Pending[Sequence[T]]]) -> Sequence[T] | Pending[Sequence[T]]:
    """The answers of all parts, one after the other; they are pending if some part's are."""

    def finish() -> list[T]:
        return [answer for part in parts for answer in (part.finish() if isinstance(part, Pending) else part)]

    def wait() -> None:
        for part in parts:
            if isinstance(part, Pending):
                part.wait()

    return Pending(wait, finish) if any(isinstance(part, Pending) for part in parts) else finish()
