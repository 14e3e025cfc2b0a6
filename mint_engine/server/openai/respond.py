"""From a job to an HTTP answer, whole or as a stream of events. What hangs up is cancelled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from mint_engine.server.openai.choice import Piece
from mint_engine.server.openai.errors import ApiError, as_api_error
from mint_engine.server.openai.generation import Generation
from mint_engine.types import SampleResponse

T = TypeVar("T")


class Format(Protocol):
    """How one of the two endpoints says things. A choice is a dict with its index."""

    def opening(self, index: int, responses: list[SampleResponse] | None) -> tuple[Piece, dict[str, Any] | None]:
        """What a choice begins with, and the chunk that says so in a stream. ``responses``: None while live."""

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]: ...

    def whole(self, index: int, piece: Piece) -> dict[str, Any]: ...

    def envelope(self, choices: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]: ...


async def answer(request: Request, generation: Generation, form: Format) -> Response:
    """The answer once all of it is there."""
    try:
        pieces, responses = await _unless_gone(request, _collect(generation))
    finally:
        generation.cancel()
    choices = [form.whole(i, join(form.opening(i, responses)[0], *own)) for i, own in enumerate(pieces)]
    return JSONResponse(form.envelope(choices, stream=False) | {"usage": usage(generation)})


async def stream(request: Request, generation: Generation, form: Format, *, include_usage: bool) -> Response:
    """The answer as server-sent events. A failure before the first token still is an error status."""
    events = _events(generation, form, include_usage)
    try:
        first = await _unless_gone(request, _first(events))
    except BaseException:
        generation.cancel()
        raise
    return _EventStream(first, events, generation)


def join(*pieces: Piece) -> Piece:
    """Pieces of one choice as one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        pieces[-1].finish_reason,
    )


def usage(generation: Generation) -> dict[str, Any]:
    """What was read and what was sampled, the tokens that ended the samples included."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


async def _collect(generation: Generation) -> tuple[list[list[Piece]], list[SampleResponse]]:
    pieces: list[list[Piece]] = [[] for _ in generation.choices]
    async for choice, piece in generation.pieces():
        pieces[choice].append(piece)
    return pieces, await generation.responses()


async def _events(generation: Generation, form: Format, include_usage: bool) -> AsyncIterator[bytes]:
    extra: dict[str, Any] = {"usage": None} if include_usage else {}

    def event(choices: list[dict[str, Any]]) -> bytes:
        return _event(form.envelope(choices, stream=True) | extra)

    begun = False
    async for index, piece in generation.pieces():
        if not begun:
            # With the first token, so that a request that fails at once has not begun an answer yet.
            begun = True
            responses = None if generation.live else await generation.responses()
            for i in range(len(generation.choices)):
                if (opening := form.opening(i, responses)[1]) is not None:
                    yield event([opening])
        yield event([form.chunk(index, piece)])
    if include_usage:
        extra = {"usage": usage(generation)}
        yield event([])
    yield b"data: [DONE]\n\n"


async def _first(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n".encode()


class _EventStream(StreamingResponse):
    """Ends the generation when the client has gone, however that shows."""

    def __init__(self, first: bytes, events: AsyncIterator[bytes], generation: Generation) -> None:
        self._generation = generation
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies are not to collect the events
        super().__init__(self._all(first, events), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()

    async def _all(self, first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield first
        try:
            async for event in events:
                yield event
        except Exception as error:  # the status has been sent: the error goes where the next chunk would
            yield _event(as_api_error(error).body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, given up when the client hangs up."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ApiError(499, "the client has gone")  # nobody reads it
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
