"""Samplers: make them, join them, sample from them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from secrets import token_hex
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from mint_engine.errors import UserError
from mint_engine.server import answers
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.context import current
from mint_engine.server.document import PROMISED
from mint_engine.server.failures import TryAgainLaterError
from mint_engine.server.promises import FULL
from mint_engine.server.reading import LARGE, body_of, read, read_object, work
from mint_engine.server.samplers import SamplerEntry
from mint_engine.server.shares import over
from mint_engine.server.state import ServerState, get_state
from mint_engine.wire.requests import (
    CreateSamplingSessionRequest,
    JoinSamplingSessionRequest,
    SampleRequest,
    parse_request,
)

router = APIRouter(tags=["sampling"])

CallerOf = Annotated[Caller, Depends(get_caller)]
State = Annotated[ServerState, Depends(get_state)]

_MOST_ANSWERED = 512 << 20  # the engine refuses what would be more


@router.post("/create_sampling_session", openapi_extra=body_of(CreateSamplingSessionRequest))
async def create_sampling_session(request: Request, caller: CallerOf, state: State) -> dict[str, Any]:
    """A sampler of a base model, or of a checkpoint. Answered when it is there."""
    body = await read(CreateSamplingSessionRequest, request, caller, state)
    await state.sessions.check(caller, body.session_id, making=True)
    base_model, model_path = body.base_model, body.model_path
    if model_path is not None:
        info = await run_in_threadpool(caller.store.weights_info, model_path)
        own_base = state.resolve_base(info.base_model)
        if base_model is not None and state.resolve_base(base_model) != own_base:
            raise UserError(f"base_model: {model_path} was trained on {info.base_model!r}, got {base_model!r}")
        base_model = None
    elif base_model is not None:
        base_model = state.resolve_base(base_model)
    sampler_id = await state.samplers.create(
        caller, body.session_id, body.sampling_session_seq_id, model_path=model_path, base_model=base_model
    )
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


@router.post("/join_sampling_session", openapi_extra=body_of(JoinSamplingSessionRequest))
async def join_sampling_session(request: Request, caller: CallerOf, state: State) -> dict[str, Any]:
    """A number for a copy of a sampling client, so that its seq_ids are its own (tinker 0.38, if configured)."""
    body = await read(JoinSamplingSessionRequest, request, caller, state)
    entry = await state.samplers.use(caller, body.sampling_session_id)
    return {"type": "join_sampling_session", "client_counter": state.samplers.join(entry)}


@router.post("/asample", openapi_extra=body_of(SampleRequest), responses=PROMISED)
async def asample(request: Request, caller: CallerOf, state: State) -> Response:
    """A promise of samples. Requests of one sampler are independent; one that comes twice is sampled once."""
    obj, size = await read_object(request, caller, state)
    body = await work(caller, size, lambda: parse_request(SampleRequest, obj))
    if body.sampling_session_id is None:
        raise UserError("sampling_session_id: expected the id of a sampler; create_sampling_session makes one")
    if body.record_stability_info:
        raise UserError("record_stability_info: not supported here, as the loss 'stable_reinforce' is not")
    context = current()
    key: int | str | None = body.seq_id
    if key is None and context is not None:
        key = context.idempotency_key
    entry = await state.samplers.use(caller, body.sampling_session_id)
    call = _call(state, await state.samplers.target(caller, entry), body)
    # From here to the promise nothing waits: two copies of a request cannot both pass.
    if (known := state.samplers.known(entry, key)) is not None:
        return answers.promised(known)
    size += _answer_bytes(state, body)
    _admit(state, caller, size)
    if size >= LARGE or body.sampling_params().stop_strings:
        future = await run_in_threadpool(call)  # the first use of a tokenizer takes seconds
        if (known := state.samplers.known(entry, key)) is not None:  # a copy of the request was faster
            state.engine.cancel_sample(future)
            return answers.promised(known)
    else:
        future = call()
    promise = state.promises.create(
        "Sample", caller.owner, scope=entry.sampler_id, request_bytes=size, seq_id=body.seq_id,
        sequence_ids=_sequence_ids(entry, body),
    )  # fmt: skip
    state.samplers.record(entry, key, promise)
    state.promises.attach(promise, future)
    return answers.promised(promise)


def _admit(state: ServerState, caller: Caller, size: int) -> None:
    """The SDK takes a 429 as advice to slow down, and sends the same request again."""
    check_queue(state, caller)
    if state.promises.full(size, caller.owner):
        raise TryAgainLaterError(FULL)


def check_queue(state: ServerState, caller: Caller, count: int = 1) -> None:
    """Raises TryAgainLaterError if the caller has as many samples waiting as it may, with ``count`` more."""
    (waiting, _), (own, _) = state.engine.sampler_load(), state.engine.sampler_load(caller.owner)
    if over(own, waiting - own, count, state.settings.sample_queue_limit):
        raise TryAgainLaterError(f"the server has {waiting} samples waiting, {own} of them yours: try again")


def _answer_bytes(state: ServerState, body: SampleRequest) -> int:
    """What the alternatives that are asked for will take in the answer, at worst."""
    prompt = body.prompt.length * (body.topk_prompt_logprobs + body.prompt_alt_tokens_k)
    tokens = body.params.max_tokens
    if tokens is None:  # until the context ends
        models = state.engine.capabilities().supported_models
        tokens = max((model.max_context_length or 0 for model in models), default=0) - body.prompt.length
    sampled = body.num_samples * tokens * body.topk_sample_logprobs
    return min(answers.TOKEN_BYTES * max(0, prompt + sampled), _MOST_ANSWERED)


def _call(state: ServerState, sampler_id: str, body: SampleRequest) -> Callable[[], Future]:
    params, prompt = body.sampling_params(), body.prompt

    def call() -> Future:
        return state.engine.sample(
            sampler_id, prompt, body.num_samples, params, include_prompt_logprobs=body.prompt_logprobs,
            topk_prompt_logprobs=body.topk_prompt_logprobs, topk_sample_logprobs=body.topk_sample_logprobs,
            target_prompt_logprobs=body.target_prompt_logprobs, prompt_alt_tokens_k=body.prompt_alt_tokens_k,
            prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        )  # fmt: skip

    return call


def _sequence_ids(entry: SamplerEntry, body: SampleRequest) -> list[str]:
    number = body.seq_id if body.seq_id is not None else token_hex(8)
    return [f"{entry.sampler_id}:seq:{number}:{i}" for i in range(body.num_samples)]
