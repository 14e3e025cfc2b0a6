"""Requests to one server, repeated until they are answered.

Every request of the protocol may safely be sent again: it carries a number (`seq_id`) or an idempotency key by which
the server knows it. So an answer that did not come, or that says "later", leads to the same request once more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from mint_engine import __version__
from mint_engine.client.remote.address import Address
from mint_engine.client.remote.failures import refusal, unreadable
from mint_engine.client.remote.pool import Pool
from mint_engine.errors import EngineClosedError, TransportError, UserError
from mint_engine.wire import PROTOBUF

M = TypeVar("M", bound=BaseModel)

log = logging.getLogger("mint_engine.client")

FIRST_DELAY, LAST_DELAY = 0.25, 10.0
LONGEST_ADVISED = 60.0  # of a Retry-After
REMIND_SECONDS = 60.0
BUG_TRIES = 4  # of a request answered 500: a mistake of the server's, which rarely passes
_LATER = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Patience:
    """Seconds of silence after which a request is given up: of a server never reached yet, and of one that was."""

    unknown: float = 5.0
    known: float = 300.0


@dataclass(frozen=True)
class Body:
    """What a request carries."""

    content: bytes
    content_type: str

    @classmethod
    def json(cls, path: str, fields: Mapping[str, Any]) -> Body:
        """Raises UserError for what JSON cannot say: numpy's numbers, NaN."""
        try:
            content = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: an argument cannot be sent: {error}") from error
        return cls(content, "application/json")

    @classmethod
    def protobuf(cls, content: bytes) -> Body:
        return cls(content, PROTOBUF)


class Transport:
    """An HTTP client that does not give up easily. Everything here runs on the loop's thread."""

    def __init__(
        self, address: Address, *, patience: Patience | None = None, wire: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """`wire`: what carries requests, for tests; default the network."""
        self.address = address
        self.patience = patience or Patience()
        headers = {"User-Agent": f"mint-engine/{__version__}", "Accept": "application/json"}
        if address.api_key is not None:
            headers["X-API-Key"] = address.api_key
        self._reached = False
        self._reminded = 0.0
        self._pool = Pool(
            f"{address.url}/api/v1/",
            {**headers, **dict(address.headers)},
            dict(address.query),
            address.timeouts,
            proxies=not address.is_loopback,  # a proxy cannot reach this machine's own servers
            wire=wire,
        )

    async def post(
        self, path: str, body: Mapping[str, Any] | Body, *, method: str = "POST",
        headers: Mapping[str, str] | None = None, **options: Any,
    ) -> httpx.Response:  # fmt: skip
        """Send JSON, or a body as it is. `options`: see `send`."""
        body = body if isinstance(body, Body) else Body.json(path, body)
        headers = {"Content-Type": body.content_type, **(headers or {})}
        return await self.send(method, path, content=body.content, headers=headers, **options)

    async def send(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        retries: float | None = None,
        expect_status: frozenset[int] = frozenset(),
    ) -> httpx.Response:
        """Send a request, again and again until it is answered or patience ends.

        Args:
            timeout: seconds to wait for the answer; default the address's.
            retries: how often to repeat it at most; default the address's. Patience ends it in any case.
            expect_status: statuses of 300 and more to return and not to raise.

        Raises:
            UserError, NotFoundError, ...: the server refused; see `failures.refusal`.
            TransportError: it cannot be reached, or cannot answer.
        """
        request = self._pool.build_request(
            method,
            path,
            content=content,
            params={k: v for k, v in (params or {}).items() if v is not None},
            headers={"X-Idempotency-Key": uuid.uuid4().hex, **(headers or {})},
            timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else self._slow(timeout),
        )
        allowed = self.address.max_retries if retries is None else retries
        most = math.inf if allowed is None else allowed
        waiting = _Waiting()
        while True:
            if self._pool.closed:
                raise EngineClosedError(f"the connection to {self.address.url} was closed before this was answered")
            try:
                response = await self._pool.send(request)
            except httpx.RequestError as error:
                problem: Exception = error
                advised, tries, patience = None, math.inf, self._patience
            else:
                self._reached = True
                status = response.status_code
                if status < 300 or status in expect_status:
                    return _checked(response)
                if status not in _LATER:
                    raise refusal(response)
                problem, advised = refusal(response), _advised_delay(response)
                tries = BUG_TRIES if status == 500 else math.inf
                patience = self._patience
                if status == 429:  # it is there and means to answer
                    patience, waiting.heard = math.inf, time.monotonic()
            delay = waiting.next_delay(advised, at_once=isinstance(problem, httpx.RemoteProtocolError))
            if waiting.attempts >= tries or waiting.attempts > most or waiting.silence + delay > patience:
                raise self._given_up(request, problem, waiting) from problem
            self._remind(request, problem, waiting)
            await asyncio.sleep(delay)

    def _slow(self, seconds: float) -> httpx.Timeout:
        """The address's timeouts, but for the wait for an answer."""
        usual = self.address.timeouts
        return httpx.Timeout((usual.connect, seconds, usual.write, usual.pool))

    def hurry(self, seconds: float) -> None:
        """From now on give up after so many seconds."""
        self.patience = replace(self.patience, unknown=seconds, known=seconds)

    async def close(self) -> None:
        await self._pool.close()

    @property
    def _patience(self) -> float:
        return self.patience.known if self._reached else self.patience.unknown

    def _remind(self, request: httpx.Request, problem: Exception, waiting: _Waiting) -> None:
        """A line now and then of what has not been answered for a while; one for all requests of the moment."""
        now = time.monotonic()
        if waiting.total >= REMIND_SECONDS and now - self._reminded >= REMIND_SECONDS:
            self._reminded = now
            log.warning(
                "%s %s: still trying after %.0f s: %s", request.method, request.url, waiting.total, _told(problem)
            )

    def _given_up(self, request: httpx.Request, problem: Exception, waiting: _Waiting) -> TransportError:
        if isinstance(problem, TransportError) and waiting.attempts == 1:
            return problem
        what = (
            str(problem) if isinstance(problem, TransportError) else f"{request.method} {request.url}: {_told(problem)}"
        )
        tries = f"tried {waiting.attempts} times in {waiting.total:.0f} s" if waiting.attempts > 1 else "tried once"
        hint = "" if self._reached else f". Is a server running at {self.address.url}?"
        return TransportError(f"{what} ({tries}){hint}")


class _Waiting:
    """How long and how often a request has been tried."""

    def __init__(self) -> None:
        self._start = self.heard = time.monotonic()
        self.attempts = 0

    @property
    def total(self) -> float:
        return time.monotonic() - self._start

    @property
    def silence(self) -> float:
        return time.monotonic() - self.heard

    def next_delay(self, advised: float | None, *, at_once: bool) -> float:
        """Seconds until the next attempt. Spread at random, so that clients do not return in step."""
        self.attempts += 1
        if advised is not None:
            return max(advised, 0.05) * (1 + 0.25 * random.random())
        if at_once and self.attempts == 1:
            return 0.0  # a kept connection that the server had just closed
        return min(FIRST_DELAY * 2.0 ** min(self.attempts - 1, 30), LAST_DELAY) * (0.5 + 0.5 * random.random())


def json_object(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON object. Raises TransportError if it is none."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise unreadable(response, "a JSON object")
    return body


def _checked(response: httpx.Response) -> httpx.Response:
    if response.status_code == 200 and "text/html" in response.headers.get("content-type", ""):
        raise unreadable(response, "an answer of the protocol")  # a login page, a start page
    return response


def _advised_delay(response: httpx.Response) -> float | None:
    """What Retry-After (in seconds) or retry-after-ms asks for, within reason."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(response.headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if seconds >= 0:
            return min(seconds, LONGEST_ADVISED)
    return None


def _told(problem: Exception) -> str:
    return str(problem) or type(problem).__name__


def answer_as(model: type[M], response: httpx.Response) -> M:
    """The answer's JSON as one of our types; its `type` is the name of the request and says nothing new."""
    body = json_object(response)
    body.pop("type", None)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise unreadable(response, f"a {model.__name__} ({error.error_count()} fields are wrong)") from error
