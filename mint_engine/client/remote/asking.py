"""What the parts of `RemoteRegistry` share: how something is asked for by its address."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from mint_engine.client.remote.transport import Transport, answer_as
from mint_engine.errors import UserError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Submit(Protocol):
    """Runs a coroutine on the loop, from any thread."""

    def __call__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]: ...


class Asking:
    def __init__(self, transport: Transport, submit: Submit) -> None:
        self._transport, self._submit = transport, submit

    def _get(self, model: type[M], *parts: str, **params: Any) -> Future[M]:
        async def run() -> M:
            return answer_as(model, await self._transport.send("GET", route_of(*parts), params=params))

        return self._submit(run)


def route_of(*parts: str) -> str:
    """The address under which the server has something; raises UserError for a part that is no id."""
    for part in parts:
        if not isinstance(part, str) or part in ("", ".", ".."):
            raise UserError(f"expected an id, got {part!r}")
    return "/".join(quote(part, safe=":") for part in parts)
