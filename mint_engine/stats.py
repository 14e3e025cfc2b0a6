"""What an engine has done and is doing, in numbers: counters since it began, and gauges of this moment."""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

from mint_engine.pending import Pending

log = logging.getLogger(__name__)

# (kind, seconds, tokens, ok): called when an operation has ended, on the thread that ended it, which waits for it.
OnOperation = Callable[[str, float, int, bool], None]


@dataclass(frozen=True)
class EngineStats:
    """Counters only grow; gauges are of this moment.

    operations, failures: how many of each kind have ended, and how many of those with an error.
    tokens_trained: of calls with a backward. tokens_scored: of those without. tokens_prefilled: prompts read for
    sampling. tokens_sampled: drawn, whether or not their request was answered in the end.
    operations_waiting: calls on models not begun yet. samples_waiting, samples_running: requests.
    """

    operations: dict[str, int]
    failures: dict[str, int]
    tokens_trained: int
    tokens_scored: int
    tokens_prefilled: int
    tokens_sampled: int
    operations_waiting: int
    samples_waiting: int
    samples_running: int
    kv_cache_bytes_used: int
    kv_cache_bytes_total: int
    resident_models: int
    samplers: int
    rss_bytes: int


class Recorder:
    """Counts operations and tells listeners of each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._listeners: list[OnOperation] = []

    def listen(self, callback: OnOperation) -> None:
        with self._lock:
            self._listeners.append(callback)

    def counts(self) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """(operations, failures, tokens) by kind."""
        with self._lock:
            return dict(self._operations), dict(self._failures), dict(self._tokens)

    def record(self, kind: str, seconds: float, tokens: int, ok: bool) -> None:
        with self._lock:
            self._operations[kind] += 1
            self._failures[kind] += not ok
            self._tokens[kind] += tokens
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(kind, seconds, tokens, ok)
            except Exception:
                log.exception("a listener for operations failed on %s", kind)

    def brief(self, kind: str, operation: Callable[[], Any]) -> Callable[[], Any]:
        """A plain function for the executor, recorded when it ends, or when what it queued on a device has."""

        def run() -> Any:
            begun = time.perf_counter()

            def recorded(part: Callable[[], Any]) -> Any:
                try:
                    result = part()
                except BaseException:
                    self.record(kind, time.perf_counter() - begun, 0, False)
                    raise
                if isinstance(result, Pending):
                    return Pending(result.wait, partial(recorded, result.finish))
                self.record(kind, time.perf_counter() - begun, 0, True)
                return result

            return recorded(operation)

        return run

    def timed(
        self, kind: str, operation: Callable[[], Any], tokens: Callable[[Any], int]
    ) -> Callable[[], Generator[Callable[[], Any], Any, Any]]:
        """The same operation for the executor, recorded when it ends. ``tokens(result)``: how many it went through."""

        def run() -> Generator[Callable[[], Any], Any, Any]:
            begun = time.perf_counter()
            try:
                result = operation()
                if isinstance(result, Generator):
                    result = yield from result
            except BaseException:
                self.record(kind, time.perf_counter() - begun, 0, False)
                raise
            self.record(kind, time.perf_counter() - begun, tokens(result), True)
            return result

        return run


def rss_bytes() -> int:
    """Memory of this process that is in RAM; where the system does not say, the most there has been."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
