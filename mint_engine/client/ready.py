"""A client that is there at once, and may all the same be waited for."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Self


class Ready:
    """Lets `client.result()` and `await client` give the client itself, for code that expects a future of a client."""

    def result(self, timeout: float | None = None) -> Self:
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self
        yield  # makes this a generator, as __await__ must return one

    def get_telemetry(self) -> None:
        """Nothing is reported to anybody: None."""
