"""What a driver did, method by method, and what came back: written as JSON for the tests to judge.

Runs in every SDK's environment and in the tests' own process, so it imports neither SDK nor engine.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT = 120.0  # seconds; nothing here takes more than a few


class Report:
    """Every call goes through `call`, `acall` or `refused`, so that a method is reported exactly if it was called."""

    def __init__(self) -> None:
        self.methods: dict[str, str] = {}  # "TrainingClient.forward" -> "ok", or "refused: <sentence>"
        self.values: dict[str, Any] = {}
        self.failures: list[str] = []

    def call(self, client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """The settled result of `client.method(...)`: futures are waited for."""
        result = settled(getattr(client, method)(*args, **kwargs))
        self._note(client, method, "ok")
        return result

    async def acall(self, client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """The same inside an event loop; what is awaited may be a future that must be awaited once more."""
        result = await getattr(client, method)(*args, **kwargs)
        while inspect.isawaitable(result) and (inner := await result) is not result:
            result = inner
        self._note(client, method, "ok")
        return result

    def refused(self, client: Any, method: str, *args: Any, **kwargs: Any) -> str:
        """The call must raise; gives the exception's class and sentence."""
        sentence = raised(lambda: settled(getattr(client, method)(*args, **kwargs)))
        self._note(client, method, f"refused: {sentence}")
        return sentence

    def attempt(self, client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """For what the server may honestly not have: an answer, or None after an exception, which is reported."""
        try:
            return self.call(client, method, *args, **kwargs)
        except Exception as error:
            by = "the SDK itself: " if isinstance(error, AssertionError) else ""
            self._note(client, method, f"refused: {by}{type(error).__name__}: {error}")
            return None

    @staticmethod
    def has(client: Any, method: str) -> bool:
        return hasattr(type(client), method)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """An exception ends its section and is reported; the sections after it still run."""
        try:
            yield
        except Exception:
            self.failures.append(f"{name}:\n{traceback.format_exc()}")

    def write(self, path: Path) -> None:
        report = {"methods": self.methods, "values": self.values, "failures": self.failures}
        path.write_text(json.dumps(report, indent=1))

    def _note(self, client: Any, method: str, outcome: str) -> None:
        name = f"{type(client).__name__}.{method}"
        if self.methods.get(name) != "ok":  # a method that also refuses bad input works all the same
            self.methods[name] = outcome


def settled(value: Any) -> Any:
    """A future's or coroutine's result, however often it is wrapped. Clients that are their own future stay."""
    while True:
        if inspect.iscoroutine(value):
            inner = asyncio.run(_awaited(value))
        elif callable(getattr(value, "result", None)):
            inner = value.result(timeout=TIMEOUT)
        else:
            return value
        if inner is value:
            return value
        value = inner


async def _awaited(coroutine: Any) -> Any:
    return await coroutine


def raised(act: Any) -> str:
    """`ExceptionClass: its message` of what `act()` raises."""
    try:
        result = act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"expected an exception, got {result!r}")
