"""Completing futures that their owners may have cancelled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

log = logging.getLogger(__name__)


def settle_all(futures: Sequence[Future], outcomes: Sequence[Any]) -> None:
    """Complete each future with its result, or with the exception that is its outcome."""
    for future, outcome in zip(futures, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            settle(future, error=outcome)
        else:
            settle(future, outcome)


def settle(future: Future, result: Any = None, error: BaseException | None = None) -> None:
    """Complete a future that its owner may have cancelled meanwhile. What its callbacks raise is logged."""
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass
    except KeyboardInterrupt:  # of the thread that cancels a sample, not of a callback
        raise
    except BaseException:  # concurrent.futures lets it pass, and it would end the device's thread
        log.exception("a callback of a future failed")
