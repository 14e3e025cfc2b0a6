"""Results: polled one by one, polled all at once, or given up."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from mint_engine import wire
from mint_engine.errors import NotFoundError
from mint_engine.server import answers
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.document import results
from mint_engine.server.failures import GoneError, RestartingError
from mint_engine.server.promises import Promise
from mint_engine.server.reading import body_of, read, work
from mint_engine.server.state import ServerState, get_state
from mint_engine.store import SCOPE
from mint_engine.wire.requests import CancelFutureRequest, RetrieveFutureRequest, RetrieveFuturesRequest

router = APIRouter(tags=["futures"])

CallerOf = Annotated[Caller, Depends(get_caller)]
State = Annotated[ServerState, Depends(get_state)]


@router.post("/retrieve_future", openapi_extra=body_of(RetrieveFutureRequest), responses=results())
async def retrieve_future(request: Request, caller: CallerOf, state: State) -> Response:
    """The result of a promise. Held until there is one, for at most `long_poll_s`; then "try_again"."""
    body = await read(RetrieveFutureRequest, request, caller, state)
    await _find(caller, state, body.request_id)
    promise = await state.promises.wait(body.request_id, caller.owner, state.settings.long_poll_s)
    if not promise.done:
        return _try_again(request, promise)
    encoded = await work(caller, promise.result_bytes, lambda: promise.result(request.headers.get("accept")))
    if body.allow_metadata_only and len(encoded.body) > state.settings.inline_result_bytes:
        return _json({"status": "complete_metadata", "response_payload_size": len(encoded.body)})
    state.promises.mark_fetched(promise)
    return Response(encoded.body, media_type=encoded.media_type)


@router.post("/retrieve_futures", openapi_extra=body_of(RetrieveFuturesRequest))
async def retrieve_futures(request: Request, caller: CallerOf, state: State) -> Response:
    """Which samples of one sampling client have ended since it last asked (tinker 0.38, if configured)."""
    body = await read(RetrieveFuturesRequest, request, caller, state)
    entry = await state.samplers.use(caller, body.target.sampling_session_id)
    for request_id in body.retrieved_request_ids:
        if (promise := state.promises.get(request_id, caller.owner)) is not None and promise.done:
            state.promises.mark_fetched(promise)
    hold = state.settings.long_poll_s
    timeout = hold if body.timeout is None else min(body.timeout, hold)
    if state.promises.stopping is not None:
        raise RestartingError(state.promises.stopping)
    completions = await state.samplers.completions(entry, body.target.cloned_sampler_id)
    ended, cursor = await completions.after(body.prev_cursor, timeout)
    if not ended and state.promises.stopping is not None:
        raise RestartingError(state.promises.stopping)
    found = [await work(caller, promise.result_bytes, partial(_completion, promise)) for promise in ended]
    return _json({"completions": found, "cursor": cursor})


@router.post("/cancel_future", openapi_extra=body_of(CancelFutureRequest))
async def cancel_future(request: Request, caller: CallerOf, state: State) -> Response:
    """Nobody waits for a sample any more: it stops at its next token. Other operations are not stopped."""
    body = await read(CancelFutureRequest, request, caller, state)
    promise = state.promises.get(body.request_id, caller.owner)
    if promise is None:
        raise NotFoundError(f"request_id: there is no request {body.request_id!r}")
    if promise.kind == "Sample" and promise.future is not None:
        state.engine.cancel_sample(promise.future)
    return _json({"type": "cancel_future", "request_id": body.request_id})


async def _find(caller: Caller, state: ServerState, request_id: str) -> None:
    """Make sure that the promise is here, or say why not.

    One of before a restart comes back with its model. A sample does not: 410 makes the SDK ask for it again.
    """
    scope = request_id.rpartition(SCOPE)[0]
    if state.promises.get(request_id, caller.owner) is not None or not scope:
        return
    if state.promises.stopping is not None:
        raise RestartingError(state.promises.stopping)
    if ":train:" in scope:
        await state.sequencer.lane(caller, scope)
    elif not await state.samplers.exists(caller, scope):
        return
    if state.promises.get(request_id, caller.owner) is None:
        raise GoneError(f"request_id: the result of {request_id} is not kept any more")


def _try_again(request: Request, promise: Promise) -> Response:
    body: dict[str, Any] = {"type": "try_again", "request_id": promise.request_id, "queue_state": "active"}
    if promise.why_waiting is not None:
        body |= {"queue_state": "paused_capacity", "queue_state_reason": promise.why_waiting}
    # The SDKs take both the same; of a 200 they write a warning into their user's log, of a 408 they do not.
    return _json(body, 408 if "x-stainless-lang" in request.headers else 200)


def _completion(promise: Promise) -> dict[str, Any]:
    if promise.failure is not None:
        return {"state": "failed", "request_id": promise.request_id}
    size = len(promise.result(wire.PROTOBUF).body)
    return {"state": "finished", "request_id": promise.request_id, "response_payload_uncompressed_size": size}


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(answers.dumps(body), status, media_type=answers.JSON)
