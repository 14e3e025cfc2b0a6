"""Waiting for the result of a request that the server has accepted.

The server holds a poll until there is a result, or for some twenty seconds; then it is asked again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx

from mint_engine.client.remote.failures import LostPromiseError, failure, refusal, unreadable
from mint_engine.client.remote.transport import Body, Transport, json_object
from mint_engine.errors import TransportError
from mint_engine.wire import PROTOBUF

log = logging.getLogger("mint_engine.client")

POLL_SECONDS = 60.0  # more than a server holds a poll
SHORTEST_POLL = 0.2  # a server that says "not yet" sooner than this is not asked again at once
NOTICE_SECONDS = 60.0
_LOST = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_PROTOBUF_KINDS = frozenset({"Forward", "ForwardBackward", "Sample"})


@dataclass(frozen=True)
class Promise:
    """A request that the server has accepted."""

    request_id: str
    kind: str
    sequence_ids: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, response: httpx.Response, kind: str) -> Promise:
        body = json_object(response)
        request_id = body.get("request_id")
        if not isinstance(request_id, str):
            raise unreadable(response, "a request_id")
        return cls(request_id, kind, list(body.get("sample_sequence_ids") or []))


async def retrieve(transport: Transport, promise: Promise) -> httpx.Response:
    """The answer that carries the result, however long it takes.

    Raises:
        LostPromiseError: the server does not know the request any more.
        MintError: the request failed; see `failures.failure`. TransportError: the server went silent.
    """
    protobuf = promise.kind in _PROTOBUF_KINDS
    headers = {"Accept": f"{PROTOBUF}, application/json" if protobuf else "application/json"}
    headers["X-Tinker-Request-Type"] = promise.kind
    body = {"request_id": promise.request_id, "allow_metadata_only": False}
    noticed, iteration = 0.0, 0
    while True:
        asked = time.monotonic()
        headers["X-Tinker-Request-Iteration"] = str(iteration)
        response = await transport.post(
            "retrieve_future",
            body,
            headers=headers,
            timeout=POLL_SECONDS,
            retries=math.inf,  # the work is being done: an answer is worth waiting for
            expect_status=_LOST | {HTTPStatus.REQUEST_TIMEOUT},
        )
        if response.status_code in _LOST:
            raise LostPromiseError(str(refusal(response)))
        if PROTOBUF in response.headers.get("content-type", ""):
            return response
        answer: dict[str, Any] = {} if response.status_code == HTTPStatus.REQUEST_TIMEOUT else json_object(response)
        if "error" in answer:
            raise failure(answer)
        if response.status_code == HTTPStatus.OK and answer.get("type") != "try_again":
            if protobuf:
                raise unreadable(response, PROTOBUF)
            return response
        if str(answer.get("queue_state", "active")) != "active" and asked - noticed >= NOTICE_SECONDS:
            noticed = asked
            log.warning("the server holds requests back: %s", answer.get("queue_state_reason") or answer["queue_state"])
        iteration += 1
        await asyncio.sleep(max(0.0, SHORTEST_POLL - (time.monotonic() - asked)))


async def result_of(transport: Transport, path: str, body: Body, promise: Promise) -> httpx.Response:
    """As `retrieve`. A server that was started anew is given the request, `body` to `path`, once more: it carries a
    number or an id by which the server knows whether it was done."""
    try:
        return await retrieve(transport, promise)
    except LostPromiseError:
        pass
    try:
        again = Promise.of(await transport.post(path, body), promise.kind)
        return await retrieve(transport, again)
    except LostPromiseError as error:
        raise lost(promise, error) from error


def lost(promise: Promise, error: LostPromiseError) -> TransportError:
    """What a user is told of a result that cannot be had any more."""
    return TransportError(f"{promise.kind}: the server accepted this request and lost its result ({error})")
