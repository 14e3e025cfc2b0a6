"""Models: make them, train them, save and load them. Every POST answers with a promise at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from mint_engine import wire
from mint_engine.errors import UserError
from mint_engine.server import answers, operations
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.document import PROMISED
from mint_engine.server.failures import TryAgainLaterError
from mint_engine.server.gate import TooLargeError
from mint_engine.server.reading import body_of, read, read_body, read_object, work
from mint_engine.server.refusals import Refusals
from mint_engine.server.served_models import is_hub_name
from mint_engine.server.state import ServerState, get_state
from mint_engine.types import GetInfoResponse, LoadWeightsResponse
from mint_engine.types.base import ResponseModel
from mint_engine.wire import requests as bodies

router = APIRouter(tags=["training"])

CallerOf = Annotated[Caller, Depends(get_caller)]
State = Annotated[ServerState, Depends(get_state)]
Body = TypeVar("Body", bound=bodies.WireRequest)

_SAVES = ("SaveWeights", "SaveWeightsForSampler", "SaveWeightsExternal")


class CreateModelResponse(ResponseModel):
    model_id: str
    type: str = "create_model"


class UnloadModelResponse(ResponseModel):
    model_id: str
    type: str = "unload_model"


# ---- making and forgetting -------------------------------------------------------------------------------------------


@router.post("/create_model", openapi_extra=body_of(bodies.CreateModelRequest), responses=PROMISED)
async def create_model(request: Request, caller: CallerOf, state: State) -> Response:
    body = await read(bodies.CreateModelRequest, request, caller, state)
    await state.sessions.check(caller, body.session_id, making=True)
    base_model, lora, seq = state.resolve_base(body.base_model), body.to_lora_config(), body.model_seq_id
    model_id = f"{body.session_id}:train:{seq}"

    def start() -> Future:
        created = state.engine.create_model(
            body.session_id, base_model, lora, user_metadata=body.user_metadata, seq=seq
        )
        return _Mapped(created, lambda made: CreateModelResponse(model_id=made))

    return answers.promised(
        await state.sequencer.create(
            caller, model_id, "CreateModel", start, lambda: state.auth.quotas.reserve_model(caller, state.engine)
        )
    )


@router.post("/load_weights", openapi_extra=body_of(bodies.LoadWeightsRequest), responses=PROMISED)
async def load_weights(request: Request, caller: CallerOf, state: State) -> Response:
    """Into an existing model, or as a new one."""
    obj, size = await read_object(request, caller, state)
    if obj.get("model_id") is not None:
        return await _submit(caller, state, "LoadWeights", bodies.LoadWeightsRequest, obj, size)
    body = bodies.parse_request(bodies.LoadWeightsRequest, obj)
    session_id, seq = body.session_id or "", body.model_seq_id or 0
    await state.sessions.check(caller, session_id, making=True)
    reader = await state.auth.reader(caller, body.weights_access_token)
    info = await run_in_threadpool(reader.weights_info, body.path)
    base_model = state.resolve_base(info.base_model)
    if body.base_model is not None and state.resolve_base(body.base_model) != base_model:
        raise UserError(f"base_model: {body.path} was trained on {info.base_model!r}, got {body.base_model!r}")

    def start() -> Future:
        created = state.engine.create_model_from_state(
            session_id, body.path, optimizer=body.optimizer, user_metadata=body.user_metadata, seq=seq, reader=reader
        )
        return _Mapped(created, lambda made: LoadWeightsResponse(path=body.path, model_id=made))

    return answers.promised(
        await state.sequencer.create(
            caller, f"{session_id}:train:{seq}", "LoadWeights", start,
            lambda: state.auth.quotas.reserve_model(caller, state.engine),
        )
    )  # fmt: skip


@router.post("/get_info", openapi_extra=body_of(bodies.GetInfoRequest), responses={200: {"model": GetInfoResponse}})
async def get_info(request: Request, caller: CallerOf, state: State) -> Response:
    body = await read(bodies.GetInfoRequest, request, caller, state)
    await state.sequencer.lane(caller, body.model_id)  # it may be on disk
    info = state.engine.get_info(body.model_id)
    if is_hub_name(info.model_name):  # a client on another machine has no use for our directory
        info = info.model_copy(
            update={"model_data": info.model_data.model_copy(update={"tokenizer_id": info.model_name})}
        )
    return Response(info.model_dump_json(exclude_none=True), media_type=answers.JSON)


@router.post("/unload_model", openapi_extra=body_of(bodies.UnloadModelRequest), responses=PROMISED)
async def unload_model(request: Request, caller: CallerOf, state: State) -> Response:
    """Let a model go, after everything submitted for it (tinker 0.22)."""
    body = await read(bodies.UnloadModelRequest, request, caller, state)

    def start() -> Future:
        unloaded = state.engine.unload_model(body.model_id)
        return _Mapped(unloaded, lambda _: UnloadModelResponse(model_id=body.model_id))

    promise = await state.sequencer.submit(caller, body.model_id, None, "UnloadModel", start)
    return answers.promised(promise)


# ---- training --------------------------------------------------------------------------------------------------------


@router.post("/forward", openapi_extra=body_of(bodies.ForwardBody), responses=PROMISED)
async def forward(request: Request, caller: CallerOf, state: State) -> Response:
    """Losses and log-probabilities (tinker 0.22; later SDKs send `forward_only` to forward_backward)."""
    obj, size = await _read_training(request, caller, state)
    return await _train(caller, state, obj, size, lambda: wire.forward_backward_from_json(obj, forward_only=True))


@router.post("/forward_backward", openapi_extra=body_of(bodies.ForwardBackwardBody, protobuf=True), responses=PROMISED)
async def forward_backward(request: Request, caller: CallerOf, state: State) -> Response:
    """Losses, log-probabilities, and gradients that are kept until the next optim_step. Protobuf or JSON."""
    if wire.PROTOBUF in request.headers.get("content-type", ""):
        body = await read_body(request, caller, state)
        return await _train(caller, state, body, len(body), lambda: wire.parse_forward_backward(body))
    obj, size = await _read_training(request, caller, state)
    return await _train(caller, state, obj, size, lambda: wire.forward_backward_from_json(obj))


async def _read_training(request: Request, caller: Caller, state: ServerState) -> tuple[dict[str, Any], int]:
    """`read_object`. Where the body is too large its number is used up all the same, if it stands at the end."""
    try:
        return await read_object(request, caller, state)
    except TooLargeError as error:
        async with Refusals(caller, state, wire.last_members(error.end)):
            raise


async def _train(
    caller: Caller, state: ServerState, raw: bytes | Mapping[str, Any], size: int,
    parse: Callable[[], wire.ForwardBackwardRequest],
) -> Response:  # fmt: skip
    async with Refusals(caller, state, raw):
        body = await work(caller, size, parse)
        kind = "Forward" if body.forward_only else "ForwardBackward"
        start = operations.start(state.engine, caller, body)
        tokens = 0 if body.forward_only else body.num_tokens
        promise = await state.sequencer.submit(
            caller, body.model_id, body.seq_id, kind, start, tokens=tokens, request_bytes=size,
            saved=lambda: operations.dump(body),
        )  # fmt: skip
    return answers.promised(promise)


@router.post("/optim_step", openapi_extra=body_of(bodies.OptimStepRequest), responses=PROMISED)
async def optim_step(request: Request, caller: CallerOf, state: State) -> Response:
    obj, size = await read_object(request, caller, state)
    return await _submit(caller, state, "OptimStep", bodies.OptimStepRequest, obj, size)


@router.post("/save_weights", openapi_extra=body_of(bodies.SaveWeightsRequest), responses=PROMISED)
async def save_weights(request: Request, caller: CallerOf, state: State) -> Response:
    obj, size = await read_object(request, caller, state)
    return await _submit(caller, state, "SaveWeights", bodies.SaveWeightsRequest, obj, size)


@router.post(
    "/save_weights_for_sampler", openapi_extra=body_of(bodies.SaveWeightsForSamplerRequest), responses=PROMISED
)
async def save_weights_for_sampler(request: Request, caller: CallerOf, state: State) -> Response:
    """A named checkpoint to sample from, or an unnamed sampler of this very version."""
    obj, size = await read_object(request, caller, state)
    return await _submit(caller, state, "SaveWeightsForSampler", bodies.SaveWeightsForSamplerRequest, obj, size)


@router.post("/save_weights_external", openapi_extra=body_of(bodies.SaveWeightsExternalRequest), responses=PROMISED)
async def save_weights_external(request: Request, caller: CallerOf, state: State) -> Response:
    """A PEFT adapter to download, encrypted if there are age recipients."""
    obj, size = await read_object(request, caller, state)
    return await _submit(caller, state, "SaveWeightsExternal", bodies.SaveWeightsExternalRequest, obj, size)


@router.post("/create_custom_loss", openapi_extra=body_of(bodies.CreateCustomLossRequest))
async def create_custom_loss(request: Request, caller: CallerOf, state: State) -> Response:
    """Refused: `client/config` says so, too, and SDKs run such losses themselves."""
    await read(bodies.CreateCustomLossRequest, request, caller, state)
    raise UserError(
        "create_custom_loss: losses that run on the server are not supported here; "
        "forward_backward_custom runs a Python function in the client"
    )


# ---- inside ----------------------------------------------------------------------------------------------------------


async def _submit(
    caller: Caller, state: ServerState, kind: str, model: type[bodies.WireRequest], obj: dict[str, Any], size: int
) -> Response:
    """An operation with a JSON body."""
    async with Refusals(caller, state, obj):
        body: Any = bodies.parse_request(model, obj)
        reading = caller
        saved: Callable[[], bytes] | None = partial(operations.dump, body)
        if kind == "LoadWeights" and body.weights_access_token:
            saved = None  # somebody's key is not written down
            reading = Caller(caller.owner, await state.auth.reader(caller, body.weights_access_token), caller.key)
        start = operations.start(state.engine, reading, body)
        if kind in _SAVES:
            await state.auth.quotas.check_disk(caller)
        unnamed = kind == "SaveWeightsForSampler" and body.path is None
        if unnamed and state.samplers.crowded(caller.owner):
            raise TryAgainLaterError("as many samplers are being made as may be at once: try again")
        promise = await state.sequencer.submit(
            caller, body.model_id, body.seq_id, kind, start, request_bytes=size, saved=saved
        )
    if unnamed:
        state.samplers.expect(promise)
    if getattr(body, "kind", None) == "inflight":
        state.samplers.expect_inflight(promise)
    return answers.promised(promise)


class _Mapped(Future):
    """A future of ``change(result)``. Cancelling it cancels ``of``, if that can be."""

    def __init__(self, of: Future, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self._of, self._change = of, change
        of.add_done_callback(self._settle)

    def cancel(self) -> bool:
        return self._of.cancel()

    def _settle(self, done: Future) -> None:
        if done.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif (error := done.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(self._change(done.result()))
