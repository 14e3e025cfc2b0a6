"""Running something with scratch memory that ends in the middle of it, in whichever thread, wherever it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mint_engine.kernels import op

T = TypeVar("T")


def until_there_is_enough(attempt: Callable[[], T], *, thinner: int = 2) -> tuple[T, int]:
    """What ``attempt`` returns at last, and how often it raised MemoryError before.

    Memory ends at its first request for scratch, at its second, ...: more thinly, the smaller ``thinner`` is, where
    there are many. One request fails or two in a row.
    """
    at = failed = 0
    while True:
        op.native.fail_scratch(at, 1 + at % 2)
        try:
            return attempt(), failed
        except MemoryError:
            failed += 1
        finally:
            op.native.fail_scratch(0, 0)
        at += 1 + at // thinner
