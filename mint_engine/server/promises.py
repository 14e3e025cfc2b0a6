"""Promises: what a POST answers at once, and `retrieve_future` waits for.

All state belongs to the event loop. An engine's future completes on the device thread; what has completed is collected
and the loop is woken once for all of it. A waiting poll is one asyncio future and one timer: thousands of them need no
thread, and nothing looks around for news.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from base64 import urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from mint_engine.errors import NotFoundError
from mint_engine.server import answers
from mint_engine.server.answers import Encoded
from mint_engine.server.failures import Failure, RestartingError, describe
from mint_engine.server.shares import over
from mint_engine.server.waiting import Bell
from mint_engine.store import SCOPE

log = logging.getLogger(__name__)

FORSAKEN_S = 300.0
"""An unfetched result of this age makes room for others when memory is short."""
MOST_PENDING = 1 << 16
"""Requests of all owners that wait: small ones take memory, too."""
FULL = "the server has as many requests and results in memory as it may: fetch what is done, or try again"
_NO_SCOPE = "req:"


@dataclass(eq=False, slots=True)
class Promise:
    """A request that was accepted.

    kind: see X-Tinker-Request-Type. tokens: that it trains on, for the ledger. request_bytes: held until it is done.
    why_waiting: told to whoever polls; None while it is on its way through the engine.
    """

    request_id: str
    kind: str
    owner: str
    model_id: str | None = None
    tokens: int = 0
    request_bytes: int = 0
    seq_id: int | None = None
    sequence_ids: Sequence[str] | None = None
    accepted: float = field(default_factory=time.time)
    finished: float | None = None
    failure: Failure | None = None
    why_waiting: str | None = None
    fetched: bool = False
    future: Future | None = field(default=None, repr=False)
    result_bytes: int = 0
    uneven: bool = False  # see `answers.is_uneven`
    value: Any = field(default=None, repr=False)  # until it is encoded
    _encoded: Encoded | None = field(default=None, repr=False)
    _bell: Bell | None = field(default=None, repr=False)

    @property
    def done(self) -> bool:
        return self.finished is not None

    def answer(self) -> dict[str, Any]:
        """The body of the POST's answer."""
        body: dict[str, Any] = {"request_id": self.request_id}
        if self.model_id is not None:
            body["model_id"] = self.model_id
        if self.sequence_ids is not None:
            body["sample_sequence_ids"] = list(self.sequence_ids)
        return body

    def result(self, accept: str | None) -> Encoded:
        """The result in the best form the client takes; a failure is JSON with a key `error`. Encoded once.

        May take milliseconds for a large result.
        """
        if self.failure is not None:
            said = {"error": self.failure.detail, "category": self.failure.category, "type": self.failure.type}
            return Encoded(answers.dumps(said), answers.JSON)  # without a type that is None
        media = answers.media_type(self.kind, accept, uneven=self.uneven)
        # In this order: another poll's thread may encode it just now, and sets the second before it clears the first.
        value, encoded = self.value, self._encoded
        if encoded is None or encoded.media_type != media:
            if encoded is not None:
                value = answers.decode(encoded, self.kind)
            encoded = answers.encode(value, media)
            if media != answers.JSON or self.kind not in answers.PROTO_KINDS:
                self._encoded, self.value = encoded, None  # protobuf can become JSON later, JSON not protobuf
        return encoded


class Promises:
    """All promises of a server.

    Args:
        result_ttl: seconds an unfetched result is kept. fetched_ttl: the same from when it was fetched: the answer may
            have been lost on its way.
        budget: bytes of waiting requests and kept results; `full` says when it is reached. At most an eighth of it
            is for fetched results; of those the oldest go first.
    """

    def __init__(self, *, result_ttl: float = 3600, fetched_ttl: float = 600, budget: int = 1 << 30) -> None:
        self._result_ttl, self._fetched_ttl, self._budget = result_ttl, fetched_ttl, budget
        self._promises: dict[str, Promise] = {}
        self._random = _unguessable()
        self._unfetched: OrderedDict[str, float] = OrderedDict()  # id -> when to let go, in the order of the times
        self._fetched: OrderedDict[str, float] = OrderedDict()
        self._expiry: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._lock = threading.Lock()
        self._completed: list[tuple[Promise, Future]] = []
        self.stopping: str | None = None
        self.on_done: list[Callable[[Promise], None]] = []  # called with each promise that is settled
        self.on_stop: list[Callable[[], None]] = []
        self.pending = 0
        self.pending_bytes = 0
        self.result_bytes = 0
        self._fetched_bytes = 0
        self._held: dict[str, tuple[int, int]] = {}  # owner -> (bytes of requests and results, requests that wait)

    # ---- making and settling -------------------------------------------------------------------------------------

    def create(
        self, kind: str, owner: str, model_id: str | None = None, *, scope: str | None = None, tokens: int = 0,
        request_bytes: int = 0, seq_id: int | None = None, sequence_ids: Sequence[str] | None = None,
        request_id: str | None = None,
    ) -> Promise:  # fmt: skip
        """A promise nobody has settled yet. ``scope``: the model or sampler it is about, if it has one."""
        self._bind()
        prefix = f"{scope or model_id}{SCOPE}" if scope or model_id else _NO_SCOPE
        promise = Promise(
            request_id or prefix + next(self._random), kind, owner, model_id, tokens, request_bytes, seq_id,
            sequence_ids,
        )  # fmt: skip
        self._promises[promise.request_id] = promise
        self.pending += 1
        self.pending_bytes += request_bytes
        self._hold(owner, request_bytes, 1)
        return promise

    def follow(
        self, future: Future, *, kind: str, owner: str, model_id: str | None = None, tokens: int = 0, **more: Any
    ) -> Promise:
        """A promise of what ``future`` will give. It may complete on any thread."""
        promise = self.create(kind, owner, model_id, tokens=tokens, **more)
        self.attach(promise, future)
        return promise

    def attach(self, promise: Promise, future: Future) -> None:
        """Settle ``promise`` by ``future`` when that is done."""
        promise.future, promise.why_waiting = future, None
        future.add_done_callback(lambda done: self._on_completed(promise, done))

    def settle(self, promise: Promise, value: Any = None, error: BaseException | None = None) -> None:
        """On the event loop's thread. The second time is ignored."""
        if promise.done:
            return
        promise.finished, promise.future = time.time(), None
        if error is None:
            promise.value = value
            promise.result_bytes, promise.uneven = answers.size(value), answers.is_uneven(value)
        else:
            promise.failure = describe(error, promise.request_id)
        self._on_settled(promise)

    def restore(self, promise: Promise, encoded: Encoded | None = None, failure: Failure | None = None) -> None:
        """Take over a finished promise of before a restart."""
        self._bind()
        if promise.request_id not in self._promises:
            self._promises[promise.request_id] = promise
            promise._encoded, promise.failure = encoded, failure
            promise.result_bytes = 0 if encoded is None else len(encoded.body)
            promise.finished = promise.finished or time.time()
            self._keep(promise)

    # ---- finding and waiting -------------------------------------------------------------------------------------

    def get(self, request_id: str, owner: str) -> Promise | None:
        """The promise if it is known and the owner's."""
        promise = self._promises.get(request_id)
        return promise if promise is not None and promise.owner == owner else None

    async def wait(self, request_id: str, owner: str, timeout: float) -> Promise:
        """The promise once it is settled, or as it is after ``timeout`` seconds.

        Raises:
            NotFoundError: there is none of that id for this owner.
            RestartingError: the server stops.
        """
        promise = self.get(request_id, owner)
        if promise is None:
            raise NotFoundError(f"request_id: there is no request {request_id!r}")
        if not promise.done:
            if self.stopping is not None:
                raise RestartingError(self.stopping)
            if promise._bell is None:
                promise._bell = Bell()
            await promise._bell.wait(timeout)
            if not promise.done and self.stopping is not None:
                raise RestartingError(self.stopping)
        return promise

    def mark_fetched(self, promise: Promise) -> None:
        """Its result was sent. From now on it is kept for a shorter time."""
        kept = self._promises.get(promise.request_id) is promise  # while it was encoded it may have been let go
        if kept and not promise.fetched:
            promise.fetched = True
            self._unfetched.pop(promise.request_id, None)
            self._fetched[promise.request_id] = time.monotonic() + self._fetched_ttl
            self._fetched_bytes += promise.result_bytes
            self._make_room()
            self._schedule_expiry()

    def of_scope(self, scope: str) -> list[Promise]:
        """Those about one model or sampler."""
        return [promise for promise in self._promises.values() if promise.request_id.startswith(scope + SCOPE)]

    def of_no_scope(self) -> list[Promise]:
        """Those about no model and no sampler."""
        return [promise for promise in self._promises.values() if promise.request_id.startswith(_NO_SCOPE)]

    def full(self, more: int, owner: str) -> bool:
        """Whether ``more`` bytes of an owner's would be too many (`shares.over`).

        While nothing of the owner's waits, only if the results that it leaves unfetched are too many already: what is
        large must not wait for ever.
        """
        self._make_room(more)
        own, waiting = self._held.get(owner, (0, 0))
        others = self.pending_bytes + self.result_bytes - own
        if not waiting:
            return over(own, others, 0, self._budget)
        return over(own, others, more, self._budget) or over(waiting, self.pending - waiting, 1, MOST_PENDING)

    def waiting_by_kind(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for promise in list(self._promises.values()):
            if not promise.done:
                counts[promise.kind] = counts.get(promise.kind, 0) + 1
        return counts

    def stop(self, reason: str) -> None:
        """Answer every held poll, and those to come, with RestartingError."""
        self.stopping = reason
        for promise in self._promises.values():
            self._ring(promise)
        for callback in self.on_stop:
            callback()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _bind(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("this application has requests on another event loop; serve it from one loop")
            self._loop, self._thread = loop, threading.get_ident()
        return loop

    def _on_completed(self, promise: Promise, future: Future) -> None:
        """On the thread that completed the future."""
        if threading.get_ident() == self._thread:
            self._settle_by(promise, future)
            return
        with self._lock:
            self._completed.append((promise, future))
            first = len(self._completed) == 1
        if first:
            try:
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._collect)
            except RuntimeError:  # the loop is closed: nobody waits any more
                pass

    def _collect(self) -> None:
        with self._lock:
            completed, self._completed = self._completed, []
        for promise, future in completed:
            try:
                self._settle_by(promise, future)
            except Exception:  # the others are not to wait for ever
                log.exception("%s could not be settled", promise.request_id)

    def _settle_by(self, promise: Promise, future: Future) -> None:
        if promise.future is not future:
            return  # a stopping server has taken the operation back
        if future.cancelled():
            self.settle(promise, error=CancelledError())
        elif (error := future.exception()) is not None:
            self.settle(promise, error=error)
        else:
            self.settle(promise, future.result())

    def _on_settled(self, promise: Promise) -> None:
        self.pending -= 1
        self.pending_bytes -= promise.request_bytes
        self._hold(promise.owner, -promise.request_bytes, -1)
        self._keep(promise)
        self._ring(promise)
        for callback in self.on_done:
            callback(promise)

    def _hold(self, owner: str, size: int, waiting: int = 0) -> None:
        own_bytes, own_waiting = self._held.get(owner, (0, 0))
        self._held[owner] = own_bytes + size, own_waiting + waiting
        if self._held[owner] == (0, 0):
            del self._held[owner]

    def _keep(self, promise: Promise) -> None:
        self.result_bytes += promise.result_bytes
        self._hold(promise.owner, promise.result_bytes)
        self._unfetched[promise.request_id] = time.monotonic() + self._result_ttl
        self._make_room()
        self._schedule_expiry()

    @staticmethod
    def _ring(promise: Promise) -> None:
        if promise._bell is not None:
            promise._bell.ring()

    def _make_room(self, more: int = 0) -> None:
        """Let go of results while they take too much: those that were fetched, then those nobody seems to want.

        Half the budget is too much: then nobody waits for results that nobody else waits for, whatever their share.
        """
        limit = self._budget // 2
        while self._fetched and self.pending_bytes + self.result_bytes + more > limit:
            self._drop(next(iter(self._fetched)))
        forsaken = time.monotonic() + self._result_ttl - FORSAKEN_S
        while self._unfetched and self.pending_bytes + self.result_bytes + more > limit:
            oldest = next(iter(self._unfetched))
            if self._unfetched[oldest] > forsaken:
                break
            self._drop(oldest)
        while len(self._fetched) > 1 and self._fetched_bytes > self._budget // 8:
            self._drop(next(iter(self._fetched)))

    def _drop(self, request_id: str) -> None:
        promise = self._promises.pop(request_id)
        self.result_bytes -= promise.result_bytes
        self._hold(promise.owner, -promise.result_bytes)
        self._unfetched.pop(request_id, None)
        if self._fetched.pop(request_id, None) is not None:
            self._fetched_bytes -= promise.result_bytes

    def _schedule_expiry(self) -> None:
        heads = [next(iter(queue.values())) for queue in (self._fetched, self._unfetched) if queue]
        if not heads or self._loop is None:
            return
        # A second late, so that many that expire together cost one wake-up.
        when = self._loop.time() + max(0.0, min(heads) - time.monotonic()) + 1.0
        if self._expiry is not None:
            if self._expiry.when() <= when:
                return
            self._expiry.cancel()
        self._expiry = self._loop.call_at(when, self._expire)

    def _expire(self) -> None:
        self._expiry, now = None, time.monotonic()
        for queue in (self._fetched, self._unfetched):
            while queue and next(iter(queue.values())) <= now:
                self._drop(next(iter(queue)))
        self._schedule_expiry()


def _unguessable() -> Iterator[str]:
    """Words of 144 random bits. Asking the system for each of them would hand the interpreter to another thread."""
    while True:
        block = secrets.token_bytes(18 * 256)
        for i in range(0, len(block), 18):
            yield urlsafe_b64encode(block[i : i + 18]).decode()
