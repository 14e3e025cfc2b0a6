"""The OpenAI-compatible face of the server: models, completions and chat completions.

`router` has no prefix; it is mounted under /v1 and /oai/api/v1.
"""

from __future__ import annotations

from fastapi import APIRouter

from mint_engine.server.openai import chat, completions, models
from mint_engine.server.openai.errors import ErrorBody

_ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 415, 429, 500, 503)
}

router = APIRouter(tags=["openai"], responses=_ERRORS)
for part in (models, completions, chat):
    router.include_router(part.router)

__all__ = ["router"]
