"""Samplers: which are in memory, which are on disk, and what is asked of each.

An RL loop makes an unnamed sampler every step and never says that it is done with one. So only the ones used last stay
in memory. A sampler of a path or of a base model can be made again; an unnamed one goes to disk and comes back, unless
its session has put aside many since.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from mint_engine.engine.residents import session_of
from mint_engine.errors import NotFoundError
from mint_engine.server.completions import CLONE, Completions
from mint_engine.server.failures import RestartingError
from mint_engine.server.promises import Promise, Promises
from mint_engine.server.shares import over
from mint_engine.store import SCOPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from mint_engine.engine import Engine
    from mint_engine.server.caller import Caller
    from mint_engine.store import Store

log = logging.getLogger(__name__)

_LONG_S = 3600.0  # between two looks at a promise that is not settled
_GRACE_S = 30.0  # somebody who has just asked for a sampler is about to use it
_NOBODY = -1  # the number of all clients that were given none


@dataclass(eq=False, slots=True)
class SamplerEntry:
    """A sampler in memory. ``requests``: request ids by seq_id, so that one which comes twice is sampled once."""

    sampler_id: str
    owner: str
    unnamed: bool
    used: float = field(default_factory=time.monotonic)
    pending: set[Promise] = field(default_factory=set)
    requests: OrderedDict[int | str, str] = field(default_factory=OrderedDict)
    clones: set[int] = field(default_factory=set)
    inflight_of: str | None = None  # a model whose newest weights it samples
    made: float = 0.0  # when, of such a one
    polled: bool = False  # somebody has asked what has ended
    completions: dict[int, Completions] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return not self.pending and time.monotonic() - self.used > _GRACE_S


class Samplers:
    """Args:
    most: samplers kept in memory, and unnamed ones of a session on disk.
    touch: called with a session's id and owner whenever one of its samplers is used.
    """

    def __init__(
        self, engine: Engine, promises: Promises, *, most: int = 64,
        touch: Callable[[str, str], None] = lambda session_id, owner: None,
    ) -> None:  # fmt: skip
        self._engine, self._promises, self._most, self._touch = engine, promises, most, touch
        self._entries: OrderedDict[str, SamplerEntry] = OrderedDict()  # least recently used first
        self._moving: dict[str, asyncio.Task[None]] = {}
        self._inflight_promises: set[Promise] = set()
        self._coming: set[Promise] = set()
        self._leaving: Counter[str] = Counter()  # by owner
        self._newest: dict[str, str] = {}  # of models with inflight samplers in memory: the one made last
        promises.on_done.append(self._on_done)
        promises.on_stop.append(self._on_stop)

    # ---- samplers ------------------------------------------------------------------------------------------------

    async def use(self, caller: Caller, sampler_id: str) -> SamplerEntry:
        """The sampler, read back from disk if it is there. Raises NotFoundError, also for another's."""
        while (moving := self._moving.get(sampler_id)) is not None:
            await asyncio.wait([moving])
        entry = self._entries.get(sampler_id)
        if entry is None:
            await asyncio.shield(self._move(sampler_id, self._open(caller, sampler_id)))
            entry = self._entries[sampler_id]
        if entry.owner != caller.owner:
            raise NotFoundError(f"sampler_id: there is no sampler {sampler_id!r}")
        entry.used = time.monotonic()
        self._entries.move_to_end(sampler_id)
        self._touch(session_of(sampler_id), caller.owner)
        return entry

    async def exists(self, caller: Caller, sampler_id: str) -> bool:
        """Whether the caller has or had such a sampler."""
        try:
            await run_in_threadpool(caller.store.get_sampler, sampler_id)
        except NotFoundError:
            return False
        return True

    async def create(
        self, caller: Caller, session_id: str, seq_id: int, *, model_path: str | None, base_model: str | None
    ) -> str:
        """Make the sampler number ``seq_id`` of a session, once, however often it is asked for."""
        sampler_id = f"{session_id}:sample:{seq_id}"
        while (moving := self._moving.get(sampler_id)) is not None:
            await asyncio.wait([moving])
        if sampler_id not in self._entries and not await self.exists(caller, sampler_id):
            if sampler_id not in self._moving and sampler_id not in self._entries:
                future = self._engine.create_sampler(
                    session_id, model_path=model_path, base_model=base_model, seq=seq_id
                )
                self._move(sampler_id, self._created(caller, sampler_id, future))
            if (moving := self._moving.get(sampler_id)) is not None:
                await asyncio.shield(moving)
        return sampler_id

    def expect(self, promise: Promise) -> None:
        """``promise`` will make an unnamed sampler."""
        if not promise.done:
            self._coming.add(promise)

    def crowded(self, owner: str) -> bool:
        """Whether an owner has as many on their way in, and out to the disk, as may be."""
        own = sum(promise.owner == owner for promise in self._coming) + self._leaving[owner]
        return over(own, 0, 1, 2 * self._most)

    def expect_inflight(self, promise: Promise) -> None:
        """The sampler that ``promise`` will make, and earlier ones of its kind, sample their model's newest weights."""
        if not promise.done:
            self._inflight_promises.add(promise)
            return
        entry = self._entries.get(getattr(promise.value, "sampling_session_id", None) or "")
        if entry is not None and entry.inflight_of is None:  # not a copy of a request of long ago
            self._make_inflight(entry, promise)

    async def target(self, caller: Caller, entry: SamplerEntry) -> str:
        """The sampler to sample from: the entry's own, or of an inflight one the newest of its model."""
        newest = self._newest.get(entry.inflight_of or "", entry.sampler_id)
        if newest != entry.sampler_id:
            await self.use(caller, newest)
        return newest

    async def put_aside(self, session_id: str) -> bool:
        """Move a session's samplers to disk; False if some are busy."""
        entries = self._of(session_id)
        for entry in entries:
            if not entry.pending and entry.sampler_id not in self._moving:
                await asyncio.shield(self._move(entry.sampler_id, self._leave(entry, keep=True)))
        return not any(entry.pending for entry in entries)

    async def let_go(self, session_id: str) -> None:
        """Nobody needs a session's samplers again. What was asked of them is still answered.

        Raises:
            RestartingError: the server stops before that.
        """
        if moving := [task for sampler_id, task in self._moving.items() if session_of(sampler_id) == session_id]:
            await asyncio.wait(moving)
        for entry in self._of(session_id):
            for promise in list(entry.pending):
                while not promise.done:
                    await self._promises.wait(promise.request_id, promise.owner, _LONG_S)
            if entry.sampler_id in self._entries and entry.sampler_id not in self._moving:
                await asyncio.shield(self._move(entry.sampler_id, self._leave(entry, keep=False)))

    def _of(self, session_id: str) -> list[SamplerEntry]:
        return [entry for entry in self._entries.values() if session_of(entry.sampler_id) == session_id]

    async def put_all_aside(self) -> None:
        """At the end of the process, after `Promises.stop`."""
        while self._moving:
            await asyncio.wait(list(self._moving.values()))
        for entry in list(self._entries.values()):
            if entry.unnamed and entry.sampler_id not in self._moving:
                await asyncio.shield(self._move(entry.sampler_id, self._leave(entry, keep=True)))

    def join(self, entry: SamplerEntry) -> int:
        """A number for one more client of the sampler; its seq_ids begin at a billion times that.

        Drawn at random: a restarted server does not know which it has given away.
        """
        while (number := 1 + secrets.randbelow(CLONE)) in entry.clones:
            pass
        entry.clones.add(number)
        return number

    # ---- requests ------------------------------------------------------------------------------------------------

    def known(self, entry: SamplerEntry, key: int | str | None) -> Promise | None:
        """The promise that a copy of a request was given; ``key`` is its seq_id or idempotency key."""
        request_id = None if key is None else entry.requests.get(key)
        return None if request_id is None else self._promises.get(request_id, entry.owner)

    def record(self, entry: SamplerEntry, key: int | str | None, promise: Promise) -> None:
        """A sample request was accepted."""
        if key is not None:
            entry.requests[key] = promise.request_id
        if entry.polled and promise.seq_id is not None:
            self._log(entry, promise.seq_id // CLONE)
        if not promise.done:
            entry.pending.add(promise)
        else:
            self._on_done(promise)

    async def completions(self, entry: SamplerEntry, clone: int) -> Completions:
        """What has ended among the requests of one client of the sampler."""
        if not entry.polled:
            entry.polled = True
            for promise in self._promises.of_scope(entry.sampler_id):
                if promise.seq_id is not None:
                    log_ = self._log(entry, promise.seq_id // CLONE)
                    if promise.done:
                        log_.add(promise)
        # A number that was given away before a restart is known by its requests.
        known = clone == 0 or clone in entry.clones or clone in entry.completions
        return self._log(entry, clone if known else _NOBODY)

    def _log(self, entry: SamplerEntry, clone: int) -> Completions:
        if clone not in entry.completions:
            entry.completions[clone] = Completions(partial(self._promises.get, owner=entry.owner))
        return entry.completions[clone]

    # ---- inside --------------------------------------------------------------------------------------------------

    def _on_done(self, promise: Promise) -> None:
        if promise.kind == "SaveWeightsForSampler":
            self._on_saved(promise)
        if promise.kind != "Sample":
            return
        entry = self._entries.get(promise.request_id.split(SCOPE)[0])
        if entry is None:
            return
        entry.pending.discard(promise)
        while entry.requests and self._promises.get(next(iter(entry.requests.values())), entry.owner) is None:
            entry.requests.popitem(last=False)  # its result is gone
        if promise.seq_id is not None and (log_ := entry.completions.get(promise.seq_id // CLONE)) is not None:
            log_.add(promise)

    def _on_saved(self, promise: Promise) -> None:
        """Perhaps an unnamed sampler was made."""
        inflight = promise in self._inflight_promises
        self._inflight_promises.discard(promise)
        self._coming.discard(promise)
        sampler_id = getattr(promise.value, "sampling_session_id", None)
        if sampler_id is None:
            return
        # A quick client may have opened it already, and its requests are known there.
        entry = self._entries.setdefault(sampler_id, SamplerEntry(sampler_id, promise.owner, unnamed=True))
        if inflight:
            self._make_inflight(entry, promise)
        self._evict()

    def _make_inflight(self, entry: SamplerEntry, promise: Promise) -> None:
        if promise.model_id is not None:
            entry.inflight_of, entry.made = promise.model_id, time.time()
            self._newest[promise.model_id] = entry.sampler_id

    def _on_stop(self) -> None:
        for entry in self._entries.values():
            for log_ in entry.completions.values():
                log_.ring()

    async def _created(self, caller: Caller, sampler_id: str, future: Future[str]) -> None:
        await asyncio.wrap_future(future)
        self._entries.setdefault(sampler_id, SamplerEntry(sampler_id, caller.owner, unnamed=False))
        self._evict()

    async def _open(self, caller: Caller, sampler_id: str) -> None:
        if self._promises.stopping is not None:  # it would leave the disk for a process that ends
            raise RestartingError(self._promises.stopping)
        entry = await run_in_threadpool(_recorded, caller, sampler_id)
        await asyncio.wrap_future(self._engine.revive_sampler(sampler_id))
        entry = self._entries.setdefault(sampler_id, entry)  # it may just have been made, and have had requests
        if entry.inflight_of is not None and entry.inflight_of not in self._newest:
            newest = await run_in_threadpool(_newest_of, caller.store, entry)
            self._newest.setdefault(entry.inflight_of, newest)
        self._evict()

    async def _leave(self, entry: SamplerEntry, *, keep: bool) -> None:
        self._entries.pop(entry.sampler_id, None)
        if keep:
            await self._park(entry)
        else:
            self._engine.release(entry.sampler_id)
        if not any(other.inflight_of == entry.inflight_of for other in self._entries.values()):
            self._newest.pop(entry.inflight_of or "", None)  # what is parked says it

    async def _park(self, entry: SamplerEntry) -> None:
        note = {} if entry.inflight_of is None else {"inflight_of": entry.inflight_of, "made": entry.made}
        self._leaving[entry.owner] += 1
        try:
            await asyncio.wrap_future(self._engine.park(entry.sampler_id, note))
        except Exception:
            log.exception("sampler %s could not be parked; it stays in memory", entry.sampler_id)
            self._entries[entry.sampler_id] = entry
            return
        finally:
            self._leaving[entry.owner] -= 1
        if entry.unnamed:
            await run_in_threadpool(self._trim_parked, session_of(entry.sampler_id), set(self._moving))

    def _trim_parked(self, session_id: str, moving: set[str]) -> None:
        """Of what nobody lets go of, the part that was put aside longest ago is nobody's any more."""
        store = self._engine.store
        for sampler_id in store.parked_ids(session_id, "sample")[: -self._most]:
            if sampler_id not in moving:
                store.unpark(sampler_id)
                log.info("sampler %s is dropped: its session has %d later ones on disk", sampler_id, self._most)

    def _evict(self) -> None:
        """Take the least recently used out of memory while there are too many."""
        staying = [entry for entry in self._entries.values() if entry.sampler_id not in self._moving]
        surplus, owned = len(staying) - self._most, Counter(entry.owner for entry in staying)
        for entry in staying:
            if surplus <= 0:
                return
            # Somebody may make them faster than the grace lets go of them.
            many = surplus > self._most and owned[entry.owner] > self._most // 2
            if entry.idle or (many and not entry.pending):
                self._move(entry.sampler_id, self._leave(entry, keep=True))
                surplus -= 1

    def _move(self, sampler_id: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Requests for the sampler wait until ``work`` is done."""

        def arrived(task: asyncio.Task[None]) -> None:
            del self._moving[sampler_id]
            task.cancelled() or task.exception()  # it may be that nobody else looks

        task = self._moving[sampler_id] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(arrived)
        return task


def _recorded(caller: Caller, sampler_id: str) -> SamplerEntry:
    """A sampler as the disk knows it. Raises NotFoundError."""
    entry = SamplerEntry(sampler_id, caller.owner, caller.store.is_ephemeral(sampler_id))
    parked = caller.store.parked(sampler_id)
    if parked is not None and "inflight_of" in parked.note:
        entry.inflight_of, entry.made = parked.note["inflight_of"], parked.note["made"]
    return entry


def _newest_of(store: Store, entry: SamplerEntry) -> str:
    """The last that was made of the inflight samplers of its model, when all others are on disk."""
    newest = entry.made, entry.sampler_id
    for sampler_id in store.parked_ids(session_of(entry.sampler_id), "sample"):
        parked = store.parked(sampler_id)
        if parked is not None and parked.note.get("inflight_of") == entry.inflight_of:
            newest = max(newest, (parked.note["made"], sampler_id))
    return newest[1]
