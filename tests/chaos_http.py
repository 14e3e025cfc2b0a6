"""As much of HTTP/1.1 as the proxy of `chaos_proxy.py` needs: whole messages in and out, connections kept alive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

_BODILESS = (b"204", b"304")


class Upstream:
    """A connection to the server, made when it is needed and kept for the next request."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes, pause: Callable[[], Awaitable[None]] | None = None) -> bytes | None:
        """The answer; None where the server hung up. ``pause``: awaited in the middle of the request."""
        kept = self._streams is not None
        answer = await self._try(request, pause)
        if answer is None and kept:  # the server had closed a connection that was idle
            answer = await self._try(request, pause)
        return answer

    async def ask_once(self, request: bytes) -> bytes | None:
        """The answer, over a connection that is closed afterwards."""
        try:
            return await self.ask(request)
        finally:
            self.close()

    async def send(self, part: bytes) -> None:
        """Send something and hang up."""
        try:
            _, writer = await self._connection()
            writer.write(part)
            await writer.drain()
        except OSError:
            pass
        finally:
            self.close()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 28)
        return self._streams

    async def _try(self, request: bytes, pause: Callable[[], Awaitable[None]] | None) -> bytes | None:
        try:
            reader, writer = await self._connection()
            half = len(request) - len(request.split(b"\r\n\r\n", 1)[1]) // 2
            writer.write(request[:half])
            await writer.drain()
            if pause is not None:
                await pause()
            writer.write(request[half:])
            await writer.drain()
            answer = await _read_answer(reader)
        except (OSError, EOFError):
            answer = None
        if answer is None or b"\r\nconnection: close" in answer.split(b"\r\n\r\n", 1)[0].lower():
            self.close()
        return answer


async def read_request(reader: asyncio.StreamReader) -> bytes | None:
    """The next request, head and body; None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    return await _with_body(reader, head, until_end=False)


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    if head.split(b" ", 2)[1] in _BODILESS:
        return head
    return await _with_body(reader, head, until_end=True)


async def _with_body(reader: asyncio.StreamReader, head: bytes, *, until_end: bool) -> bytes:
    """A chunked body is put together. ``until_end``: one without a length goes on to the end of the connection."""
    lines = head[:-4].split(b"\r\n")
    fields = {}
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = await _chunks(reader)
        kept = [line for line in lines if not line.lower().startswith(b"transfer-encoding")]
        return b"\r\n".join([*kept, f"content-length: {len(body)}".encode()]) + b"\r\n\r\n" + body
    if b"content-length" in fields:
        return head + await reader.readexactly(int(fields[b"content-length"]))
    return head + await reader.read(-1) if until_end else head


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        size = int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16)
        body += (await reader.readexactly(size + 2))[:-2]
        if not size:
            return body
