"""What one key may use: request bytes, requests at once, resident models, disk.

    release = await state.auth.quotas.reserve_model(caller, state.engine)     # before engine.create_model
    future.add_done_callback(lambda _: release())
    await state.auth.quotas.check_disk(caller)                                # before a checkpoint is saved

Request bytes and requests at once are enforced by `gate.Gate`, which every request passes. A limit of the key itself
goes before the server's default; None means no limit.
"""

from __future__ import annotations

import asyncio
import resource
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from starlette.concurrency import run_in_threadpool

from mint_engine.errors import NotFoundError, UserError
from mint_engine.server.shares import over

if TYPE_CHECKING:
    from mint_engine.engine import Engine
    from mint_engine.server.caller import Caller
    from mint_engine.server.settings import Settings
    from mint_engine.store import KeyLimits, Store

_T = TypeVar("_T")
_POLLS_PER_REQUEST = 64  # a held long poll costs a connection and no work


@dataclass(frozen=True)
class Limits:
    """Of one caller. None = unlimited."""

    request_bytes: int | None
    concurrent_requests: int | None
    resident_models: int | None
    disk_bytes: int | None

    def concurrent(self, *, polls: bool) -> int | None:
        limit = self.concurrent_requests
        if not polls or limit is None:
            return limit
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # each holds one: the others need some, too
        return max(limit, min(limit * _POLLS_PER_REQUEST, files // 2))


class Quotas:
    """The limits of every caller, and what is in use just now."""

    def __init__(self, settings: Settings) -> None:
        self._defaults = Limits(
            settings.max_request_bytes,
            settings.max_concurrent_requests,
            settings.max_resident_models,
            settings.max_disk_bytes,
        )
        self._lock = threading.Lock()
        self._running: Counter[tuple[str, bool]] = Counter()
        self._bytes: Counter[str] = Counter()  # of the requests that are being read, by owner
        self._all_bytes, self._most_bytes = 0, settings.memory_budget_bytes
        self._coming: Counter[str] = Counter()
        self.unpacking = asyncio.Lock()  # held while an upload is checked, which takes memory

    def limits(self, caller: Caller) -> Limits:
        return self._of(caller.key.limits if caller.key is not None else None)

    def _of(self, own: KeyLimits | None) -> Limits:
        if own is None:
            return self._defaults
        return Limits(
            _first(own.max_request_bytes, self._defaults.request_bytes),
            _first(own.max_concurrent_requests, self._defaults.concurrent_requests),
            _first(own.max_resident_models, self._defaults.resident_models),
            _first(own.max_disk_bytes, self._defaults.disk_bytes),
        )

    def disk_limit(self, store: Store, owner: str) -> int | None:
        """Of an owner whose request has been answered already. Asks the database."""
        try:
            key = store.keys.get(owner)
        except NotFoundError:  # it needs none
            key = None
        return self._of(key.limits if key is not None else None).disk_bytes

    def enter(self, caller: Caller, *, polls: bool) -> bool:
        """Count a request in; False if there are too many already. `polls`: it only waits for a result."""
        limit = self.limits(caller).concurrent(polls=polls)
        with self._lock:
            if limit is not None and self._running[caller.owner, polls] >= limit:
                return False
            self._running[caller.owner, polls] += 1
            return True

    def leave(self, caller: Caller, *, polls: bool, size: int = 0) -> None:
        """A request is answered; `size`: bytes it held."""
        with self._lock:
            _take(self._running, (caller.owner, polls))
            _take(self._bytes, caller.owner, size)
            self._all_bytes -= size

    def hold(self, caller: Caller, size: int, more: int) -> bool:
        """Count `more` bytes of a request that holds `size`; False if the requests of this caller hold too many."""
        with self._lock:
            own = self._bytes[caller.owner] - size
            if over(own, self._all_bytes - own - size, size + more, self._most_bytes):
                return False
            self._bytes[caller.owner] += more
            self._all_bytes += more
            return True

    async def reserve_model(self, caller: Caller, engine: Engine) -> Callable[[], None]:
        """Room for one more model in memory. Call what is answered once, when the model is there or has failed.

        Raises:
            UserError: the caller has as many as it may; says how to free one.
        """
        limit, owner = self.limits(caller).resident_models, caller.owner
        with self._lock:
            if limit is not None and (have := engine.resident_models(owner) + self._coming[owner]) >= limit:
                raise UserError(
                    f"this key may keep {limit} models in memory at once and has {have}: close a session that is done "
                    "(ServiceClient.close()), or end its program and wait until its models are parked"
                )
            self._coming[owner] += 1
        return _once(lambda: self._arrived(owner))

    def _arrived(self, owner: str) -> None:
        with self._lock:
            _take(self._coming, owner)

    async def check_disk(self, caller: Caller, coming: int = 0) -> None:
        """Raises UserError if the caller's checkpoints, and `coming` more bytes, take more than they may.

        What is being written at the same time is not counted yet: the limit can be passed by that much.
        """
        if self.limits(caller).disk_bytes is not None:
            await run_in_threadpool(self.check_disk_now, caller, coming)

    def check_disk_now(self, caller: Caller, coming: int = 0) -> None:
        """The same on a thread that may wait for the database."""
        limit = self.limits(caller).disk_bytes
        if limit is None:
            return
        used = caller.store.disk_usage()
        if used + coming > limit or used >= limit:
            more = f", and {coming:,} more are to come" if coming else ""
            raise UserError(
                f"this key's checkpoints may take {limit:,} bytes and take {used:,}{more}: delete some "
                "(`tinker checkpoint delete`, RestClient.delete_checkpoint) or let them expire (ttl_seconds)"
            )


def _first(own: int | None, default: int | None) -> int | None:
    return default if own is None else own


def _take(counter: Counter[_T], key: _T, count: int = 1) -> None:
    counter[key] -= count
    if counter[key] <= 0:
        del counter[key]


def _once(do: Callable[[], None]) -> Callable[[], None]:
    lock = threading.Lock()

    def call() -> None:
        if lock.acquire(blocking=False):
            do()

    return call
