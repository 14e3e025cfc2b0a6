"""What Prometheus is told. Everything is read when it asks; only durations are recorded as they happen.

Tokens per second are `rate(mint_tokens_total[1m])`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mint_engine import __version__

if TYPE_CHECKING:
    from mint_engine.engine import Engine
    from mint_engine.server.promises import Promise, Promises

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HTTP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_OPERATION_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """A registry of its own, so that an application this one is mounted in keeps its metrics apart."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, promises: Promises) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "mint_http_requests", "HTTP requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "mint_http_request_seconds", "Time to answer an HTTP request; polls are held on purpose.", ["route"],
            buckets=_HTTP_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._operation_seconds = Histogram(
            "mint_operation_seconds", "Time the engine took for an operation, waiting excluded.", ["kind"],
            buckets=_OPERATION_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._promise_seconds = Histogram(
            "mint_promise_seconds", "From accepting a request to its result, waiting included.", ["kind"],
            buckets=_OPERATION_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._failures = Counter(
            "mint_failures", "Requests that failed after they were accepted.", ["kind", "category"],
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Live(engine, promises))
        engine.on_operation(self._on_operation)
        promises.on_done.append(self._on_promise)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered. ``route`` is its pattern, so that ids do not become labels."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def _on_operation(self, kind: str, seconds: float, tokens: int, ok: bool) -> None:
        self._operation_seconds.labels(kind).observe(seconds)

    def _on_promise(self, promise: Promise) -> None:
        self._promise_seconds.labels(promise.kind).observe((promise.finished or promise.accepted) - promise.accepted)
        if promise.failure is not None:
            self._failures.labels(promise.kind, promise.failure.category).inc()


class _Live(Collector):
    """Numbers that somebody else keeps."""

    def __init__(self, engine: Engine, promises: Promises) -> None:
        self._engine, self._promises = engine, promises

    def collect(self) -> Iterator[Metric]:
        stats, promises = self._engine.stats(), self._promises
        tokens = CounterMetricFamily("mint_tokens", "Tokens gone through, by what for.", labels=["what"])
        for what in ("trained", "scored", "prefilled", "sampled"):
            tokens.add_metric([what], getattr(stats, f"tokens_{what}"))
        yield tokens
        operations = CounterMetricFamily("mint_operations", "Operations of the engine, by kind.", labels=["kind", "ok"])
        for kind, count in stats.operations.items():
            failed = stats.failures.get(kind, 0)
            operations.add_metric([kind, "true"], count - failed)
            operations.add_metric([kind, "false"], failed)
        yield operations
        waiting = GaugeMetricFamily("mint_queue_depth", "Requests accepted and not begun.", labels=["queue"])
        waiting.add_metric(["operations"], stats.operations_waiting)
        waiting.add_metric(["samples"], stats.samples_waiting)
        yield waiting
        pending = GaugeMetricFamily("mint_promises_pending", "Requests accepted and not done.", labels=["kind"])
        for kind, count in promises.waiting_by_kind().items():
            pending.add_metric([kind], count)
        yield pending
        yield _gauge("mint_samples_running", "Sample requests being decoded.", stats.samples_running)
        yield _gauge("mint_resident_models", "Training models in memory.", stats.resident_models)
        yield _gauge("mint_resident_samplers", "Samplers in memory.", stats.samplers)
        memory = GaugeMetricFamily("mint_memory_bytes", "Memory, by what for.", labels=["what"])
        memory.add_metric(["process"], stats.rss_bytes)
        memory.add_metric(["kv_cache_used"], stats.kv_cache_bytes_used)
        memory.add_metric(["kv_cache_total"], stats.kv_cache_bytes_total)
        memory.add_metric(["requests"], promises.pending_bytes)
        memory.add_metric(["results"], promises.result_bytes)
        yield memory
        info = GaugeMetricFamily("mint_info", "Always 1; its label says which version runs.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
