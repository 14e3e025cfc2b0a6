"""What the parts of `RemoteEngine` share: the connection, the models' lanes, and how an operation is sent."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from mint_engine.client.remote.address import Address
from mint_engine.client.remote.background import background
from mint_engine.client.remote.lane import Lane
from mint_engine.client.remote.limits import Limits
from mint_engine.client.remote.promises import Promise, result_of
from mint_engine.client.remote.samples import Numbers
from mint_engine.client.remote.sessions import BEAT_SECONDS, Sessions
from mint_engine.client.remote.transport import Body, Patience, Transport, answer_as
from mint_engine.errors import EngineClosedError, NotFoundError
from mint_engine.types import FinishReason, GetInfoResponse, GetSamplerResponse

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Work = Callable[[], Coroutine[Any, Any, T]]


class RemoteCore:
    def __init__(
        self, address: Address, *, patience: Patience | None = None, beat_seconds: float = BEAT_SECONDS,
        wire: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        self.address = address
        self._background = background()
        self._transport = Transport(address, patience=patience, wire=wire)
        self._sessions = Sessions(self._transport, self._background, beat_seconds)
        self._numbers = Numbers()
        self._lock = threading.Lock()
        self._models: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)  # of each session
        self._samplers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
        self._lanes: dict[str, Lane] = {}
        self._unloading: dict[str, asyncio.Task[None]] = {}
        self._unloaded: set[str] = set()  # while a client holds them
        self._infos: dict[str, GetInfoResponse] = {}
        self._sampler_infos: dict[str, GetSamplerResponse] = {}
        self._ending: dict[str, tuple[FinishReason, str | None]] = {}  # closed sessions that are still sampled from
        self._limits: asyncio.Task[Limits] | None = None
        self._slots: asyncio.Semaphore | None = None
        self._closed = False

    def _submit(self, work: Work[T], *, cancellable: bool = False) -> Future[T]:
        if os.getpid() != self._background.pid:
            return refused(
                f"this connection to {self.address.url} was made in process {self._background.pid}, before a fork; "
                "make a ServiceClient (or unpickle the SamplingClient) in this one"
            )
        if self._closed:
            return refused(f"the connection to {self.address.url} is closed")
        return self._background.submit(work, cancellable=cancellable)

    def _next(self, counters: defaultdict[str, Iterator[int]], session_id: str) -> int:
        with self._lock:
            return next(counters[session_id])

    def _lane(self, model_id: str) -> Lane:
        """Only on the loop's thread. A model that was unloaded gets no second one: it would count from 1 again, and a
        server answers a number it knows with the old result."""
        if model_id in self._unloaded:
            raise NotFoundError(f"model_id: there is no model {model_id!r} (unloaded)")
        if model_id not in self._lanes:
            self._lanes[model_id] = Lane(self._transport, model_id)
        return self._lanes[model_id]

    def _operation(self, answer: type[M], path: str, kind: str, body: Mapping[str, Any]) -> Future[M]:
        async def run() -> M:
            return answer_as(answer, await self._in_lane(self._lane(body["model_id"]), path, kind, body))

        return self._submit(run)

    async def _in_lane(self, lane: Lane, path: str, kind: str, body: Mapping[str, Any]) -> httpx.Response:
        async def send() -> Callable[[], Coroutine[Any, Any, httpx.Response]]:
            accepted = await lane.post(path, kind, lambda seq: Body.json(path, given(body) | {"seq_id": seq}))
            return accepted.result

        return await lane.call(send)

    async def _ask(self, path: str, kind: str, body: Mapping[str, Any]) -> httpx.Response:
        """A request outside of any lane, and its result."""
        sent = Body.json(path, given(body))
        promise = Promise.of(await self._transport.post(path, sent), kind)
        return await result_of(self._transport, path, sent, promise)

    async def _get_limits(self) -> Limits:
        if self._limits is None or (self._limits.done() and (self._limits.cancelled() or self._limits.exception())):
            self._limits = self._background.spawn(Limits.fetch(self._transport))
        return await asyncio.shield(self._limits)


def given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def refused(reason: str) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(EngineClosedError(reason))
    return future
