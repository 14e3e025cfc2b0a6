"""Every operation of every model, in order, once: what stands between the routes and the engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from mint_engine.engine.residents import session_of
from mint_engine.errors import NotFoundError, UserError
from mint_engine.server import resume
from mint_engine.server.context import current
from mint_engine.server.failures import RestartingError, TryAgainLaterError
from mint_engine.server.lane import Lane, Operation
from mint_engine.server.promises import FULL, Promise, Promises

if TYPE_CHECKING:
    from mint_engine.engine import Engine
    from mint_engine.server.caller import Caller
    from mint_engine.store import Parked

log = logging.getLogger(__name__)

Start = Callable[[], Future]
CREATION = 0
"""The seq_id under which a model's creation is remembered."""


class GapError(UserError):
    """An operation that was not run because one before it never came."""


class Sequencer:
    """Orders, dedupes and hands operations to the engine.

    Args:
        gap_timeout: seconds that an operation waits for one with a lower seq_id.
        touch: called with a session's id whenever one of its models is used.
        restart: makes a `start` of what `Operation.saved` gave, for operations of before a restart.
        reserve: makes sure that a model of the caller's may come into memory (`Quotas.reserve_model`).
    """

    def __init__(
        self, engine: Engine, promises: Promises, *, gap_timeout: float = 330,
        touch: Callable[[str, str], None] = lambda session_id, owner: None,
        restart: Callable[[Caller, str, bytes], Start] | None = None,
        reserve: Callable[[Caller], Awaitable[Callable[[], None]]] | None = None,
    ) -> None:  # fmt: skip
        self._reserve = reserve
        self._engine, self._promises, self._gap_timeout = engine, promises, gap_timeout
        self._touch, self._restart = touch, restart
        self._lanes: dict[str, Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # a task needs somebody who holds it
        self._moving: dict[str, asyncio.Task[None]] = {}  # models on their way from or to the disk
        self._gaps: dict[str, tuple[int, asyncio.TimerHandle]] = {}
        promises.on_done.append(self._on_done)

    # ---- operations ----------------------------------------------------------------------------------------------

    async def submit(
        self, caller: Caller, model_id: str, seq_id: int | None, kind: str, start: Start, *, tokens: int = 0,
        request_bytes: int = 0, saved: Callable[[], bytes] | None = None,
    ) -> Promise:  # fmt: skip
        """A promise of an operation of a model.

        ``start`` is called once, in order, on the event loop's thread, and must return at once. A request that comes
        again gets the promise of the first.

        Raises:
            NotFoundError: the model is not there, or not the caller's.
            UserError: the seq_id is used up, or another kind of request has it.
            TryAgainLaterError: the server holds all it can.
        """
        lane = await self.lane(caller, model_id)
        # From here to the end nothing waits: two copies of a request cannot both pass.
        self._check_running()
        key = _idempotency_key()
        if (known := self._known(lane, kind, seq_id, key)) is not None:
            return known
        if seq_id is not None:
            lane.check(seq_id)
        # What others wait for is always taken: they could not go on otherwise.
        fills_gap = seq_id is not None and seq_id == lane.missing
        if not fills_gap and lane.crowded:
            raise TryAgainLaterError(f"{lane.model_id} has as many requests waiting for an earlier one as it may")
        if not fills_gap and self._promises.full(request_bytes, caller.owner):
            raise TryAgainLaterError(FULL)
        promise = self._promises.create(
            kind, caller.owner, model_id, tokens=tokens, request_bytes=request_bytes, seq_id=seq_id
        )
        lane.add(Operation(promise, start, saved), key if seq_id is None else None)
        self._advance(lane)
        return promise

    async def create(
        self, caller: Caller, model_id: str, kind: str, start: Start,
        reserve: Callable[[], Awaitable[Callable[[], None]]] | None = None,
    ) -> Promise:  # fmt: skip
        """A promise of the operation that makes a model. The same id again is the same request again.

        ``reserve``: makes sure that there is room for it; what it answers is called when the model is there.
        """
        lane = self._lanes.get(model_id)
        if lane is None and await run_in_threadpool(_has_run, caller, model_id):
            lane = await self.lane(caller, model_id)  # of before a restart
        self._check_running()
        release = None if lane is not None or reserve is None else await reserve()
        lane = self._lanes.get(model_id)  # a copy of the request may have been faster
        if lane is not None:
            if release is not None:
                release()
            if lane.owner == caller.owner and (known := self._known(lane, kind, CREATION)) is not None:
                return known
            raise UserError(f"model_seq_id: there is a model {model_id!r} already")
        lane = self._lanes[model_id] = Lane(model_id, caller.owner, CREATION)
        promise = self._promises.create(kind, caller.owner, model_id, seq_id=CREATION)
        lane.add(Operation(promise, start if release is None else _then(start, release)))
        self._advance(lane)
        return promise

    def refuse(self, model_id: str, seq_id: int | None) -> None:
        """A request of the model's owner was answered 4xx: its number is used up, those behind it need not wait."""
        lane = self._lanes.get(model_id)
        if lane is not None and seq_id is not None and lane.request_of(seq_id) is None:
            lane.refuse(seq_id)
            self._advance(lane)

    # ---- models --------------------------------------------------------------------------------------------------

    async def lane(self, caller: Caller, model_id: str) -> Lane:
        """The model's lane; one that is on disk begins to come back. Raises NotFoundError, also for another's model."""
        while (lane := self._lanes.get(model_id)) is None or model_id in self._moving:
            if (moving := self._moving.get(model_id)) is not None:
                await asyncio.wait([moving])
            else:
                self._check_running()
                await asyncio.shield(self._move(model_id, self._open(caller, model_id)))
        if lane.owner != caller.owner:
            raise NotFoundError(f"model_id: there is no model {model_id!r}")
        self._touch(session_of(model_id), caller.owner)
        return lane

    def _move(self, model_id: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Requests for the model wait until ``work`` is done."""

        def arrived(task: asyncio.Task[None]) -> None:
            del self._moving[model_id]
            task.cancelled() or task.exception()  # it may be that nobody else looks

        task = self._moving[model_id] = self._keep(work)
        task.add_done_callback(arrived)
        return task

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def models(self, session_id: str) -> list[str]:
        """The ids of a session's models that are in memory."""
        return [model_id for model_id in self._lanes if session_of(model_id) == session_id]

    def busy(self, model_id: str) -> bool:
        lane = self._lanes.get(model_id)
        return model_id in self._moving or (lane is not None and bool(lane.unsettled))

    async def park(self, model_id: str) -> bool:
        """Write an idle model to disk and free its memory; False if it is busy. The next request brings it back."""
        lane = self._lanes.get(model_id)
        if lane is None or self.busy(model_id):
            return False
        task = self._move(model_id, self._park(lane))
        await asyncio.shield(task)
        return model_id not in self._lanes

    async def unload(self, model_id: str) -> None:
        """Let a model go, wherever it is, once what was submitted for it is done. What still waits for a gap fails."""
        while (moving := self._moving.get(model_id)) is not None:
            await asyncio.wait([moving])
        if (lane := self._lanes.get(model_id)) is not None:
            self._fail_waiting(lane, "the session was finished before this could run")
            self._forget(lane)
        elif await run_in_threadpool(self._engine.store.parked, model_id) is None:
            return
        with suppress(NotFoundError):  # its creation failed
            await asyncio.wrap_future(self._engine.unload_model(model_id))

    async def stop(self) -> list[tuple[Lane, list[Operation]]]:
        """At the end: take back what the engine has not begun. Answers every model's lane and what was taken back.

        `Promises.stop` comes first: after it nothing new is taken.
        """
        while self._moving:
            await asyncio.wait(list(self._moving.values()))
        for _, timer in self._gaps.values():
            timer.cancel()
        self._gaps.clear()
        return [(lane, resume.withdraw(lane)) for lane in self._lanes.values()]

    # ---- inside --------------------------------------------------------------------------------------------------

    def _known(self, lane: Lane, kind: str, seq_id: int | None, key: str | None = None) -> Promise | None:
        """The promise that a copy of this request was given. Raises UserError if it was another kind of request's."""
        request_id = lane.request_of(seq_id, key)
        if request_id is None:
            return None
        promise = self._promises.get(request_id, lane.owner)
        if promise is None:
            # One whose result is long gone is answered all the same: a late copy of a request, which nobody reads.
            return Promise(request_id, "", lane.owner, lane.model_id)
        if promise.kind != kind:
            what = f"X-Idempotency-Key: {key}" if seq_id is None else f"seq_id: {seq_id}"
            raise UserError(f"{what} of {lane.model_id}: expected the {promise.kind} that has it once more, got {kind}")
        return promise

    def _advance(self, lane: Lane) -> None:
        """Start what may start."""
        for operation in lane.ready():
            self._begin(lane, operation)
        missing = lane.missing
        for operation in lane.waiting if missing is not None else ():
            operation.promise.why_waiting = f"seq_id {missing} of {lane.model_id} has not arrived yet"
        self._watch(lane, missing)

    def _begin(self, lane: Lane, operation: Operation) -> None:
        lane.unsettled.add(operation.promise)
        try:
            future = operation.start()
        except Exception as error:
            self._promises.settle(operation.promise, error=error)
            return
        lane.started.append(operation)
        self._promises.attach(operation.promise, future)

    def _begin_or_wait(self, lane: Lane, operation: Operation) -> None:
        """Of before a restart: what had been in the engine's hands starts at once, the rest waits for its gap."""
        seq_id = operation.promise.seq_id
        if seq_id < lane.next_seq if seq_id is not None else lane.missing is None:
            self._begin(lane, operation)
        else:
            lane.add(operation)
            self._advance(lane)

    def _watch(self, lane: Lane, missing: int | None) -> None:
        """A timer for a gap, anew whenever the lane has moved on."""
        watched = self._gaps.get(lane.model_id)
        if watched is not None:
            if watched[0] == missing:
                return
            watched[1].cancel()
            del self._gaps[lane.model_id]
        if missing is not None:
            timer = asyncio.get_running_loop().call_later(self._gap_timeout, self._give_up, lane, missing)
            self._gaps[lane.model_id] = missing, timer

    def _give_up(self, lane: Lane, missing: int) -> None:
        self._gaps.pop(lane.model_id, None)
        if lane.missing == missing:
            self._fail_waiting(
                lane,
                f"the request with seq_id {missing} of {lane.model_id} did not arrive within {self._gap_timeout:g} s, "
                "so this one, which comes after it, was not run",
            )

    def _fail_waiting(self, lane: Lane, reason: str) -> None:
        for operation in lane.give_up():
            self._promises.settle(operation.promise, error=GapError(reason))

    def _on_done(self, promise: Promise) -> None:
        if promise.model_id is not None and (lane := self._lanes.get(promise.model_id)) is not None:
            lane.settled(promise)

    async def _open(self, caller: Caller, model_id: str) -> None:
        """Make the lane of a model that this process has not seen yet, or not since it was parked."""
        parked = await run_in_threadpool(self._look_up, caller, model_id)
        if parked is not None:
            release = await self._room(caller)
            try:
                await asyncio.wrap_future(self._engine.unpark(model_id))
            finally:  # if it could not be read, nothing has happened: the next request tries again
                release()
        lane = self._lanes[model_id] = Lane(model_id, caller.owner)
        if parked is not None:
            resume.from_note(parked.note, lane, caller, self._promises, self._restart, self._begin_or_wait)

    async def _room(self, caller: Caller) -> Callable[[], None]:
        """Room for a model that was accepted once: it is waited for, not refused."""
        if self._reserve is None:
            return lambda: None
        try:
            return await self._reserve(caller)
        except UserError as error:
            raise TryAgainLaterError(str(error)) from None

    def _check_running(self) -> None:
        if self._promises.stopping is not None:
            raise RestartingError(self._promises.stopping)

    def _look_up(self, caller: Caller, model_id: str) -> Parked | None:
        if not _has_run(caller, model_id):
            raise NotFoundError(f"model_id: there is no model {model_id!r}")
        if self._engine.is_resident(model_id):
            return None
        parked = caller.store.parked(model_id)
        if parked is None:
            raise NotFoundError(
                f"model_id: {model_id!r} is not in memory any more (unloaded, or lost with a server that was killed); "
                "its checkpoints are there: create_training_client_from_state"
            )
        return parked

    async def _park(self, lane: Lane) -> None:
        model_id = lane.model_id
        note = resume.to_note(lane, self._promises)
        self._forget(lane)
        try:
            await asyncio.wrap_future(self._engine.park(model_id, note))
        except NotFoundError:
            pass  # its creation failed: there is nothing to keep
        except Exception:
            log.exception("%s could not be parked; it stays in memory", model_id)
            self._lanes[model_id] = lane

    def _forget(self, lane: Lane) -> None:
        self._lanes.pop(lane.model_id, None)
        if (watched := self._gaps.pop(lane.model_id, None)) is not None:
            watched[1].cancel()


def _idempotency_key() -> str | None:
    context = current()
    return None if context is None else context.idempotency_key


def _has_run(caller: Caller, model_id: str) -> bool:
    return caller.store.has_run(model_id)


def _then(start: Start, release: Callable[[], None]) -> Start:
    def run() -> Future:
        try:
            future = start()
        except BaseException:
            release()
            raise
        future.add_done_callback(lambda _: release())
        return future

    return run
