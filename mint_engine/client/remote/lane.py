"""The requests of one model, sent in the order of the calls.

Each gets the next number (`seq_id`) when its turn comes; the next call has its turn when the server has accepted it.
Sending a request again, whatever became of its answer, sends the same number: the server applies it once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

from mint_engine.client.remote.promises import Promise, result_of
from mint_engine.client.remote.transport import Body, Transport
from mint_engine.errors import MintError, TransportError
from mint_engine.wire import ForwardBackwardRequest, encode_forward_backward

T = TypeVar("T")
MakeBody = Callable[[int], Body]

POLLS = 4  # results of one model that are waited for at once: they come in order


class Accepted:
    """A request of a lane that the server has accepted."""

    def __init__(self, lane: Lane, path: str, body: Body, promise: Promise) -> None:
        self._lane, self._path, self._body, self._promise = lane, path, body, promise

    async def result(self) -> httpx.Response:
        """The answer that carries the result."""
        async with self._lane.polls:
            return await result_of(self._lane.transport, self._path, self._body, self._promise)


class Lane:
    """One model's place in line. Everything here runs on the loop's thread."""

    def __init__(self, transport: Transport, model_id: str) -> None:
        self.transport, self.model_id = transport, model_id
        self.polls = asyncio.Semaphore(POLLS)
        self._turn = asyncio.Lock()
        self._next_seq = 1
        self._broken: TransportError | None = None

    async def call(self, send: Callable[[], Awaitable[Callable[[], Awaitable[T]]]]) -> T:
        """`send()` posts a call's requests when its turn comes, and gives what waits for their results."""
        async with self._turn:
            if self._broken is not None:
                raise TransportError(
                    f"an earlier request of {self.model_id} got no answer, so nobody knows whether it was applied; "
                    f"make a new training client from the last checkpoint ({self._broken})"
                )
            results = await send()
        return await results()

    async def post(self, path: str, kind: str, make_body: MakeBody) -> Accepted:
        """Send the next request. To be called from `send`.

        Raises:
            TransportError: there was no answer. The model's later calls are refused from now on.
            UserError, ...: the server refused it.
        """
        seq = self._next_seq
        body = make_body(seq)  # a request that cannot be written uses up no number
        self._next_seq += 1
        try:
            promise = Promise.of(await self.transport.post(path, body), kind)
        except TransportError as error:
            self._broken = error
            raise
        except MintError:
            await self._use_up(seq)
            raise
        return Accepted(self, path, body, promise)

    async def settled(self) -> None:
        """Wait until every call made so far has been sent."""
        async with self._turn:
            pass

    async def _use_up(self, seq: int) -> None:
        """Send something that does nothing under a number whose request was refused.

        A server that could not read the request does not know which number it had, and would wait for it.
        """
        nothing = ForwardBackwardRequest(self.model_id, seq, [], "cross_entropy", {}, forward_only=True)
        with contextlib.suppress(MintError):
            body = Body.protobuf(encode_forward_backward(nothing))
            await self.transport.post("forward_backward", body, retries=0)
