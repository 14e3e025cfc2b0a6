"""The request that is being answered, for whatever runs on its behalf: log lines, replays, new promises."""

from __future__ import annotations

import itertools
import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

_USABLE = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class RequestContext:
    """``request_id``: answered as X-Request-ID, and in every log line. ``idempotency_key``: the client's, if any."""

    request_id: str
    idempotency_key: str | None = None


# Ids of one process differ, and those of two almost surely. They open nothing, so they may be guessed.
_process, _numbers = secrets.token_hex(5), itertools.count(1)
_current: ContextVar[RequestContext | None] = ContextVar("mint_request", default=None)


def current() -> RequestContext | None:
    """The request this code runs for; None outside of one."""
    return _current.get()


def enter(request_id: str | None, idempotency_key: str | None) -> RequestContext:
    """Make a context and put it in force for this task. An id the client gave is kept if it is harmless in a log."""
    if request_id is None or not _USABLE.fullmatch(request_id):
        request_id = f"{_process}-{next(_numbers):x}"
    if idempotency_key is not None and len(idempotency_key) > 256:
        idempotency_key = None
    context = RequestContext(request_id, idempotency_key)
    _current.set(context)
    return context
