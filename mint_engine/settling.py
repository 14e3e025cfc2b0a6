"""Completing futures that their owners may have cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any


def settle_all(futures: Sequence[Future], outcomes: Sequence[Any]) -> None:
    """Complete each future with its result, or with the exception that is its outcome."""
    for future, outcome in zip(futures, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            settle(future, error=outcome)
        else:
            settle(future, outcome)


def settle(future: Future, result: Any = None, error: BaseException | None = None) -> None:
    """Complete a future that its owner may have cancelled meanwhile."""
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass
