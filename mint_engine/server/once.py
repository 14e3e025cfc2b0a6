"""Requests that must not be done twice, though their answer was lost and the client sends them again.

Training requests carry a `seq_id` for that. Making sessions, copying, interpolating and deleting have none: what
repeats there is the SDK's `X-Idempotency-Key`, and the body.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from starlette.requests import Request

T = TypeVar("T")
_Answers: TypeAlias = OrderedDict[tuple[str, ...], tuple[float, asyncio.Task[Any]]]

_KEPT_SECONDS = 900.0  # the SDKs retry for five minutes
_KEPT = 4096


async def once(request: Request, owner: str, body: str, make: Callable[[], Awaitable[T]]) -> T:
    """`make()`, or what it gave when this very request came before; a failure is not kept.

    The work is finished even if the client hangs up: it will ask again. On the application's event loop.
    """
    key = request.headers.get("x-idempotency-key")
    if not key or len(key) > 256:
        return await make()
    answers = _answers_of(request)
    entry = (owner, request.url.path, key, hashlib.sha256(body.encode()).hexdigest())
    known = answers.get(entry)
    if known is None or _failed(known[1]):
        answers.pop(entry, None)
        known = answers[entry] = (time.monotonic(), asyncio.ensure_future(make()))
    answer: T = await asyncio.shield(known[1])
    return answer


def _answers_of(request: Request) -> _Answers:
    state = request.app.state
    if not hasattr(state, "mint_answers"):
        state.mint_answers = OrderedDict()
    answers: _Answers = state.mint_answers
    oldest = time.monotonic() - _KEPT_SECONDS
    while answers and (len(answers) >= _KEPT or next(iter(answers.values()))[0] < oldest):
        answers.popitem(last=False)
    return answers


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
