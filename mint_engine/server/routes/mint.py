"""What MinT adds to the protocol, and the tokenizer files for clients that have no hub."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from mint_engine.models.hub import resolve_model
from mint_engine.server import operations
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.document import PROMISED, files
from mint_engine.server.failures import RestartingError, TryAgainLaterError
from mint_engine.server.once import once
from mint_engine.server.promises import FULL
from mint_engine.server.reading import body_of, read_object, work
from mint_engine.server.refusals import Refusals
from mint_engine.server.state import ServerState, get_state
from mint_engine.wire.requests import InterpolateCheckpointsRequest, ReverseKLRequest, parse_request

router = APIRouter(tags=["mint"])

Who = Annotated[Caller, Depends(get_caller)]
State = Annotated[ServerState, Depends(get_state)]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
)  # fmt: skip
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same files make the same bytes


@router.post("/mint/checkpoints/interpolate", openapi_extra=body_of(InterpolateCheckpointsRequest), responses=PROMISED)
async def interpolate_checkpoints(caller: Who, state: State, request: Request) -> dict[str, Any]:
    """A new sampler checkpoint whose weight update is the weighted sum of those of `source_paths`."""
    obj, size = await read_object(request, caller, state)
    body = await work(caller, size, lambda: parse_request(InterpolateCheckpointsRequest, obj))
    await state.auth.quotas.check_disk(caller)

    async def start() -> dict[str, Any]:
        if state.promises.stopping is not None:
            raise RestartingError(state.promises.stopping)
        if state.promises.full(size, caller.owner):
            raise TryAgainLaterError(FULL)
        future = state.engine.interpolate_checkpoints(
            caller.owner, body.source_paths, body.coefficients, output_name=body.output_path, reader=caller.store
        )
        return state.promises.follow(
            future, kind="MintInterpolateCheckpoints", owner=caller.owner, request_bytes=size
        ).answer()

    return await once(request, caller.owner, body.model_dump_json(), start)


@router.get(
    "/mint/tokenizer",
    response_class=Response,
    responses={200: files("The files.", "application/zip"), 304: {"description": "The caller has them."}},
)
async def tokenizer(
    caller: Who,
    state: State,
    request: Request,
    base_model: Annotated[str, Query(min_length=1, max_length=512, description="A base model that is served.")],
) -> Response:
    """The files of a base model's tokenizer, as a zip. They change rarely: `If-None-Match` saves the transfer."""
    name = state.resolve_base(base_model)
    directory = (await run_in_threadpool(resolve_model, name, state.engine.home)).directory
    content, etag = await run_in_threadpool(_zip, directory)
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"ETag": etag})
    return Response(content, media_type="application/zip", headers={"ETag": etag})


@lru_cache(maxsize=4)
def _zip(directory: Path) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in TOKENIZER_FILES:
            if (path := directory / name).is_file():
                archive.writestr(zipfile.ZipInfo(name, _LONG_AGO), path.read_bytes(), zipfile.ZIP_DEFLATED)
    content = buffer.getvalue()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


@router.post("/mint/forward_backward_reverse_kl", openapi_extra=body_of(ReverseKLRequest), responses=PROMISED)
async def forward_backward_reverse_kl(caller: Who, state: State, request: Request) -> dict[str, Any]:
    """Reverse KL to a reference model over the whole vocabulary; adds gradients as forward_backward does."""
    obj, size = await read_object(request, caller, state)
    async with Refusals(caller, state, obj):
        body = await work(caller, size, lambda: parse_request(ReverseKLRequest, obj))
        promise = await state.sequencer.submit(
            caller,
            body.model_id,
            body.seq_id,
            "MintForwardBackwardReverseKL",
            operations.start(state.engine, caller, body),
            tokens=sum(datum.student_input.length for datum in body.data),
            request_bytes=size,
            saved=lambda: operations.dump(body),
        )
    return promise.answer()
