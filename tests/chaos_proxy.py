"""A bad network between a client and a server: requests are lost, late, doubled, overtaken, cut off, answered 502.

Which request meets which fault is drawn for every path of its own: the n-th request to a path has the same fate in
every run with the same seed, whatever happens on other paths, so a failing run can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from chaos_http import Upstream, read_request

UNSEEN = ("drop request", "reset", "cut request", "502")
"""The server has not got the request, or not all of it."""
UNHEARD = ("drop answer", "cut answer", "late 502")
"""The server has done its work, and the client does not know."""
TWICE = ("duplicate", "late copy")
"""The server gets the request twice: at once, or again after it was answered."""
SLOW = ("delay", "stall request", "stall answer")
"""Requests overtake each other; a body comes in two halves."""
FAULTS = (*UNSEEN, *UNHEARD, *TWICE, *SLOW)

_BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_ID = re.compile(r"[^/]*[:%][^/]*|[0-9a-f-]{32,}")


@dataclass
class ChaosProxy:
    """What happened is counted in ``counts``, by fault, and in ``by_path``, by (path, fault); no fault is "none".

    Args:
        rate: share of the requests that meet a fault; ``rates`` has others for paths that end so. Every kind of fault
            comes equally often: of every len(FAULTS) / rate requests to a path, each befalls one.
        max_delay: seconds that something late is late at most.
        spare: paths that only pass: SDKs do not repeat these.
    """

    upstream: str
    seed: int = 0
    rate: float = 0.25
    rates: Mapping[str, float] = field(default_factory=dict)
    max_delay: float = 0.1
    spare: tuple[str, ...] = ("/client/config", "/client/dynamic_config", "/auth/token")
    counts: Counter[str] = field(default_factory=Counter)
    by_path: Counter[tuple[str, str]] = field(default_factory=Counter)
    url: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.upstream)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80
        self._decks: defaultdict[str, list[str]] = defaultdict(list)
        self._dealt: Counter[str] = Counter()
        self._random = random.Random(self.seed)
        self._later: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the client's, and one to the server behind it."""
        upstream = Upstream(*self._address)
        try:
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                while (request := await read_request(reader)) is not None:
                    if not await self._handle(request, upstream, writer):
                        break
        finally:
            upstream.close()
            writer.close()

    async def _handle(self, request: bytes, upstream: Upstream, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        fault = self._draw(request.split(b" ", 2)[1].decode().partition("?")[0])
        match fault:
            case "drop request":
                return False
            case "reset":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return False
            case "cut request":
                await upstream.send(request[: -1 - self._random.randrange(max(1, len(_body(request))))])
                return False
            case "502":
                return await _write(writer, _BAD_GATEWAY)
            case "delay":
                await self._pause()
            case "late copy":
                self._send_later(request)
        pause = self._pause if fault == "stall request" else None
        answers = [upstream.ask(request, pause)]
        if fault == "duplicate":
            answers.insert(self._random.randrange(2), Upstream(*self._address).ask_once(request))
        answer = (await asyncio.gather(*answers))[0]
        if answer is None or fault == "drop answer":
            return False
        if fault == "late 502":
            return await _write(writer, _BAD_GATEWAY)
        if fault in ("cut answer", "stall answer"):
            half = len(answer) - 1 - self._random.randrange(max(1, len(_body(answer))))
            await _write(writer, answer[:half])
            if fault == "cut answer":
                return False
            await self._pause()
            answer = answer[half:]
        return await _write(writer, answer) and b"connection: close" not in answer.split(b"\r\n\r\n", 1)[0].lower()

    def _draw(self, path: str) -> str:
        """From a pack of cards of the path's own: each fault once, and so many blanks that the rate is right."""
        fault, path = "none", _ID.sub("*", path)
        rate = next((rate for end, rate in self.rates.items() if path.endswith(end)), self.rate)
        if rate > 0 and not path.endswith(self.spare):
            if not self._decks[path]:
                self._decks[path] = [*FAULTS, *["none"] * round(len(FAULTS) / rate - len(FAULTS))]
                self._dealt[path] += 1
                random.Random(f"{self.seed} {path} {self._dealt[path]}").shuffle(self._decks[path])
            fault = self._decks[path].pop()
        self.counts[fault] += 1
        self.by_path[path, fault] += 1
        return fault

    async def _pause(self) -> None:
        await asyncio.sleep(self._random.random() * self.max_delay)

    def _send_later(self, request: bytes) -> None:
        async def send() -> None:
            await self._pause()
            await Upstream(*self._address).ask_once(request)

        task = asyncio.ensure_future(send())
        self._later.add(task)
        task.add_done_callback(self._later.discard)


def _body(message: bytes) -> bytes:
    return message.split(b"\r\n\r\n", 1)[1]


async def _write(writer: asyncio.StreamWriter, data: bytes) -> bool:
    writer.write(data)
    await writer.drain()
    return True


@contextmanager
def chaos_proxy(upstream: str, **options: Any) -> Iterator[ChaosProxy]:
    """Run a proxy in a thread of its own while the block runs."""
    proxy = ChaosProxy(upstream, **options)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def start() -> asyncio.Server:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 28)
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        return server

    def run() -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(start())
        loop.run_forever()
        server.close()
        loop.run_until_complete(_cancel(asyncio.all_tasks(loop)))
        loop.close()

    thread = threading.Thread(target=run, name="chaos-proxy", daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _cancel(tasks: set[asyncio.Task[Any]]) -> Coroutine[Any, Any, Any]:
    for task in tasks:
        task.cancel()

    async def end() -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # connections that were closed go

    return end()
