"""What every request passes: who asks is known, and what a key may send is enforced, before a body is read.

`Gate` is ASGI middleware: `app.add_middleware(Gate)`. It answers nothing itself. It raises the HTTPException of a
refusal where the application reads the body (FastAPI and Starlette pass that on to the exception handlers), so that a
refusal looks like every other error. Bytes are counted as they arrive; `Content-Length` is believed only when it is
too large. Of a training request that is too large the end is looked at, if it is near: there stands its number, which
the model's next requests wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from mint_engine.server.auth import Auth
    from mint_engine.server.caller import Caller

_KEY = "mint.visit"
_POLLS = ("/retrieve_future", "/retrieve_futures")
# FastAPI parses these bodies on the event loop, where they would hold up everybody: some 100 ms at this size.
_TEXTS, _TEXT_BYTES = ("/completions",), 8 << 20
_BODILESS = ("GET", "HEAD", "OPTIONS")
_NUMBERED = ("/forward", "/forward_backward")
SKIMMED = 16 << 20
"""Bytes beyond the limit that may come before the end of such a body: tinker 0.22 makes them no larger by itself."""
_END = 1 << 10


class TooLargeError(HTTPException):
    """``end``: the last bytes of the body, if it was followed so far."""

    def __init__(self, limit: int, got: Any, end: bytes = b"") -> None:
        super().__init__(413, f"request body: expected at most {limit} bytes, got {got}", {"Connection": "close"})
        self.end = end


class Gate:
    """See the module's docstring."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = scope[_KEY] = _Visit(scope)
        try:
            await self._app(scope, visit.guard(receive), send)
        finally:
            visit.leave()


def hold(scope: Scope, size: int) -> None:
    """Count `size` more bytes that a request has in memory, until it is answered. Raises HTTPException 429."""
    visit: _Visit | None = scope.get(_KEY)
    if visit is not None:
        visit.hold(size)


async def admit(scope: Scope) -> Caller:
    """The caller of a request, counted among its owner's. Raises HTTPException 401, 403 or 429."""
    visit: _Visit | None = scope.get(_KEY)
    if visit is None:  # a part of the application that is tested without the gate
        return await _auth(scope).caller(HTTPConnection(scope))
    return await visit.admit()


def _auth(scope: Scope) -> Auth:
    auth: Auth = scope["app"].state.mint.auth
    return auth


class _Visit:
    """One request on its way through."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._polls = scope["path"].endswith(_POLLS)
        self._caller: Caller | None = None
        self._held = 0

    async def admit(self) -> Caller:
        if self._caller is None:
            caller = await _auth(self._scope).caller(HTTPConnection(self._scope))
            quotas = _auth(self._scope).quotas
            if not quotas.enter(caller, polls=self._polls):
                limit = quotas.limits(caller).concurrent(polls=self._polls)
                raise HTTPException(
                    429, f"this key may have {limit} requests at once: try again", headers={"Retry-After": "1"}
                )
            self._caller = caller
        return self._caller

    def leave(self) -> None:
        if self._caller is not None:
            _auth(self._scope).quotas.leave(self._caller, polls=self._polls, size=self._held)

    def hold(self, size: int) -> None:
        assert self._caller is not None
        if not _auth(self._scope).quotas.hold(self._caller, self._held, size):
            raise HTTPException(
                429,
                "this key has as many bytes of requests on their way as it may: try again",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        self._held += size

    def guard(self, receive: Receive) -> Receive:
        headers = Headers(scope=self._scope)
        announced = headers.get("content-length", "")
        if self._scope["method"] in _BODILESS and not announced and "transfer-encoding" not in headers:
            return receive
        count, done = 0, False

        async def counted() -> Message:
            nonlocal count, done
            if done:
                return await receive()
            limit = _auth(self._scope).quotas.limits(await self.admit()).request_bytes
            if self._scope["path"].endswith(_TEXTS):
                limit = min(limit or _TEXT_BYTES, _TEXT_BYTES)
            if count == 0 and limit is not None and announced.isdecimal() and int(announced) > limit:
                most = limit + SKIMMED
                end = await self._skim(receive, most) if int(announced) <= most else b""
                raise TooLargeError(limit, int(announced), end)
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                count += size
                done = not message.get("more_body", False)
                if limit is not None and count > limit:
                    rest = limit + SKIMMED - (count - size)  # from this message on
                    raise TooLargeError(limit, "more", await self._skim(receive, rest, message))
                self.hold(size)
            return message

        return counted

    async def _skim(self, receive: Receive, most: int, message: Message | None = None) -> bytes:
        """The end of the body, if it comes within ``most`` bytes and is of use. ``message``: what came last."""
        if not self._scope["path"].endswith(_NUMBERED):
            return b""
        end, count = b"", 0
        while count <= most:
            message = message or await receive()
            if message["type"] != "http.request":
                return b""
            body = message.get("body", b"")
            end, count = (end + body)[-_END:], count + len(body)
            if not message.get("more_body", False):
                return end
            message = None
        return b""
