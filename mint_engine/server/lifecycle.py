"""What happens to models and samplers when their session is silent, ends, or the server does."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from mint_engine.errors import MintError
from mint_engine.server import resume
from mint_engine.server.failures import RestartingError

if TYPE_CHECKING:
    from mint_engine.server.caller import Caller
    from mint_engine.server.lane import Lane, Operation
    from mint_engine.server.state import ServerState

log = logging.getLogger(__name__)

PURGE_S = 60.0
"""Between two looks for checkpoints that have expired."""


async def put_aside(state: ServerState, session_id: str) -> bool:
    """Move a silent session's models and samplers to disk. False if some are busy: they are looked at again later."""
    idle = True
    for model_id in state.sequencer.models(session_id):
        idle = await state.sequencer.park(model_id) and idle
    return await state.samplers.put_aside(session_id) and idle


async def end_session(state: ServerState, caller: Caller, session_id: str, *, keep: bool) -> None:
    """The client has said that it is done. What was submitted is still done first."""
    try:
        if keep:
            await put_aside(state, session_id)
            return
        runs = (await run_in_threadpool(caller.store.get_session, session_id)).training_run_ids
        for model_id in {*state.sequencer.models(session_id), *runs}:
            await state.sequencer.unload(model_id)
        await state.samplers.let_go(session_id)
        await run_in_threadpool(_forget_parked_samplers, caller, session_id)
        state.engine.forget_session(session_id)
    except RestartingError:
        log.info("session %s was still busy when the server stopped", session_id)
    except Exception:  # a task of its own, of which nobody waits for the end
        log.exception("session %s could not be ended", session_id)


def _forget_parked_samplers(caller: Caller, session_id: str) -> None:
    for sampler_id in caller.store.parked_ids(session_id, "sample"):
        caller.store.unpark(sampler_id)


class Housekeeping:
    """Removes checkpoints that have expired, now and then, while the server runs."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(PURGE_S, self._begin)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._purge())
        self.start()

    async def _purge(self) -> None:
        try:
            removed = await run_in_threadpool(self._state.engine.store.purge_expired)
            if removed:
                log.info("removed %d expired checkpoints", removed)
        except Exception:
            log.exception("expired checkpoints could not be removed")


async def stop(state: ServerState) -> None:
    """The end: finish what runs, put everything aside, write what is to be written.

    What the engine has not begun is taken back and goes to disk with its model, so that nothing accepted is lost.
    """
    begun = time.monotonic()
    if state.promises.stopping is None:
        state.promises.stop("the server is restarting: try again")
    if state.housekeeping is not None:
        state.housekeeping.stop()
    lanes = await state.sequencer.stop()
    if state.settings.park_on_shutdown:
        grace = state.settings.shutdown_grace_s
        await asyncio.gather(
            *(_put_aside_for_good(state, lane, back, grace) for lane, back in lanes), _keep_others(state, grace)
        )
        await state.samplers.put_all_aside()
    await state.ledger.flush()
    log.info("stopped after %.1f s", time.monotonic() - begun)


async def _put_aside_for_good(state: ServerState, lane: Lane, taken_back: list[Operation], grace: float) -> None:
    """Write one model to disk, once what runs of it is done, with what its server has still to do and to say."""
    running = [o.promise.future for o in lane.started if not o.promise.done and o.promise.future is not None]
    if not await _done(running, grace):
        log.warning("%s is not kept: it was not done within %g s (shutdown_grace_s)", lane.model_id, grace)
        return
    try:
        note = resume.to_note(lane, state.promises, taken_back)
        await asyncio.wrap_future(state.engine.park(lane.model_id, note))
    except MintError as error:
        log.warning("%s is not kept: %s", lane.model_id, error)


async def _keep_others(state: ServerState, grace: float) -> None:
    """Write down what came of requests about no model."""
    running = [promise.future for promise in state.promises.of_no_scope() if promise.future is not None]
    if not await _done(running, grace):
        log.warning("interpolations are not kept that were not done within %g s (shutdown_grace_s)", grace)
    try:
        resume.keep_others(state.engine.store.home, state.promises)
    except OSError as error:
        log.warning("results of interpolations are not kept: %s", error)


async def _done(running: list[Future], grace: float) -> bool:
    """Whether all of them end within the grace."""
    if not running:
        return True
    _, unfinished = await asyncio.wait([asyncio.wrap_future(future) for future in running], timeout=grace)
    await asyncio.sleep(0)  # their promises are settled by callbacks that are due now
    return not unfinished
