"""Request bodies: read, decompressed and parsed, large ones off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel

from mint_engine import wire
from mint_engine.server import gate
from mint_engine.server.caller import Caller
from mint_engine.server.shares import workers
from mint_engine.server.state import ServerState
from mint_engine.wire.requests import parse_request

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

documented: list[type[BaseModel]] = []
"""Bodies that `body_of` has named."""

LARGE = 64 << 10
"""Bytes from which a body is parsed in a thread: about a millisecond's work."""


async def read_body(request: Request, caller: Caller, state: ServerState) -> bytes:
    """The body without its Content-Encoding. (`gate.Gate` has counted what came over the wire.)"""
    raw = await request.body()
    encoding = request.headers.get("content-encoding")
    if encoding in (None, "", "identity"):
        return raw
    limit = state.auth.quotas.limits(caller).request_bytes or state.settings.max_request_bytes
    body = await workers.run(caller.owner, lambda: wire.decode_body(raw, encoding, limit))
    gate.hold(request.scope, len(body))
    return body


async def work(caller: Caller, size: int, job: Callable[[], T]) -> T:
    """``job()``, in a thread if ``size`` bytes of work are worth it."""
    return job() if size < LARGE else await workers.run(caller.owner, job)


async def read_object(request: Request, caller: Caller, state: ServerState) -> tuple[dict[str, Any], int]:
    """The JSON object in the body, and the size of the body."""
    body = await read_body(request, caller, state)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(415, f"Content-Type: expected application/json, got {kind!r}")
    return await work(caller, len(body), lambda: wire.parse_json(body)), len(body)


async def read(model: type[Model], request: Request, caller: Caller, state: ServerState) -> Model:
    """The body as ``model``. Raises WireError."""
    obj, size = await read_object(request, caller, state)
    return await work(caller, size, lambda: parse_request(model, obj))


def body_of(model: type[BaseModel], *, protobuf: bool = False) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body by itself. `app.py` adds the schema it refers to."""
    documented.append(model)
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if protobuf:
        content[wire.PROTOBUF] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}
