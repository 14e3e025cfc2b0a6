"""GET models: the base models that are served, and the caller's own checkpoints for sampling."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from mint_engine.errors import UserError
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.openai.errors import ApiError, OpenAIRoute
from mint_engine.server.openai.samplers import SCHEMES
from mint_engine.server.state import ServerState, get_state
from mint_engine.types import Checkpoint

router = APIRouter(route_class=OpenAIRoute)

_PAGE = 500
_STARTED = int(time.time())


@router.get("/models")
async def list_models(
    caller: Annotated[Caller, Depends(get_caller)], state: Annotated[ServerState, Depends(get_state)]
) -> JSONResponse:
    bases = [_model(name, _STARTED, "mint-engine") for name in state.served.names]
    return JSONResponse({"object": "list", "data": bases + await run_in_threadpool(_checkpoints, caller)})


@router.get("/models/{model:path}")
async def get_model(
    model: str,
    caller: Annotated[Caller, Depends(get_caller)],
    state: Annotated[ServerState, Depends(get_state)],
) -> JSONResponse:
    try:
        if model.startswith(SCHEMES):
            found = await run_in_threadpool(caller.store.resolve, model, "sampler_weights")
            return JSONResponse(_model(found.tinker_path, int(found.record.time.timestamp()), caller.owner))
        return JSONResponse(_model(state.resolve_base(model), _STARTED, "mint-engine"))
    except UserError as error:
        raise ApiError(404, f"model: {error}", param="model", code="model_not_found") from error


def _checkpoints(caller: Caller) -> list[dict[str, Any]]:
    found: list[Checkpoint] = []
    while True:
        page = caller.store.list_user_checkpoints(_PAGE, len(found), kinds=("sampler_weights",)).checkpoints
        found += page
        if len(page) < _PAGE:
            break
    return [_model(checkpoint.tinker_path, int(checkpoint.time.timestamp()), caller.owner) for checkpoint in found]


def _model(name: str, created: int, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner}
