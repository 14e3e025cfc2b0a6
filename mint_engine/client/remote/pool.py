"""Connections to one server, each used by one request at a time and kept for the next.

httpx keeps such a pool too, and looks through all of it at every request: with 500 samples under way that was 10 ms of
each. A client of its own for every connection, and a stack of those that are free, cost the same with one as with 1000.
"""

from __future__ import annotations

from collections.abc import Mapping

import httpx

KEEP_ALIVE_SECONDS = 4.0  # less than the 5 s after which uvicorn closes an idle connection
MOST_IDLE = 64


class Pool:
    """Everything here runs on the loop's thread.

    Args:
        wire: what carries requests instead of the network.
        proxies: whether the environment may name a proxy.
    """

    def __init__(
        self, base_url: str, headers: Mapping[str, str], query: Mapping[str, str], timeout: httpx.Timeout, *,
        proxies: bool, wire: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        self._base_url, self._headers, self._query, self._timeout = base_url, headers, query, timeout
        self._proxies, self._wire = proxies, wire
        self._verify = httpx.create_ssl_context(trust_env=proxies)  # takes milliseconds, and can be shared
        self._idle: list[httpx.AsyncClient] = []
        self._writer = self._make()
        self.closed = False

    def build_request(self, *args: object, **kwargs: object) -> httpx.Request:
        """As `httpx.Client.build_request`. The request can be sent any number of times."""
        return self._writer.build_request(*args, **kwargs)  # type: ignore[arg-type]

    async def send(self, request: httpx.Request) -> httpx.Response:
        """The answer, read to its end. Raises httpx.RequestError."""
        client = self._idle.pop() if self._idle else self._make()
        try:
            return await client.send(request)
        finally:
            if self.closed or len(self._idle) >= MOST_IDLE:
                await client.aclose()
            else:
                self._idle.append(client)

    async def close(self) -> None:
        self.closed = True
        idle, self._idle = self._idle, []
        for client in idle:
            await client.aclose()
        await self._writer.aclose()

    def _make(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._base_url,
            headers=self._headers,
            params=self._query,
            timeout=self._timeout,
            transport=self._wire,
            verify=self._verify,
            trust_env=self._proxies,
            limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS),
        )
