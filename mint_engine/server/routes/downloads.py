"""Where signed links lead: one file of a checkpoint, an archive of it, a session's timeline."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool

from mint_engine.server.document import ErrorAnswer, files
from mint_engine.server.routes.checkpoints import files_of
from mint_engine.server.signed_urls import BadLinkError, Grant, version_of
from mint_engine.server.state import ServerState, get_state
from mint_engine.store import Store

router = APIRouter(tags=["downloads"])

_GONE = "what the link leads to has been deleted or replaced since it was made"
_HEADERS = {"Cache-Control": "private", "X-Content-Type-Options": "nosniff"}


@router.get(
    "/downloads/{token}/{file}",
    response_model=None,
    response_class=Response,
    responses={
        200: files("The file."),
        206: files("The part that was asked for."),
        403: {"model": ErrorAnswer, "description": "The link was changed, or its time is over."},
        416: {"description": "There is no such part."},
    },
)
@router.head("/downloads/{token}/{file}", response_model=None, include_in_schema=False)
async def download(token: str, file: str, state: Annotated[ServerState, Depends(get_state)]) -> Response:
    """The link is the permission: no key is asked for. Parts of a file can be asked for (Range)."""
    try:
        grant = state.signer.open(token)
    except BadLinkError as error:
        raise HTTPException(403, str(error)) from None
    if file != grant.file or not await state.auth.known(grant.owner):
        raise HTTPException(403, "the link was changed, or the key it was made with has been revoked")
    store = state.engine.store.as_owner(grant.owner)
    if grant.what == "trace":
        return JSONResponse(await run_in_threadpool(store.session_trace, grant.name))
    path = await run_in_threadpool(_archive if grant.what == "archive" else _file, store, grant)
    return FileResponse(path, filename=grant.file, media_type=_media_type(grant.file), headers=_HEADERS)


def _file(store: Store, grant: Grant) -> Path:
    checkpoint = store.resolve(grant.name)
    if version_of(checkpoint.directory) != grant.version or grant.file not in files_of(checkpoint):
        raise HTTPException(404, _GONE)
    return checkpoint.directory / grant.file


def _archive(store: Store, grant: Grant) -> Path:
    if version_of(store.resolve(grant.name).directory) != grant.version:
        raise HTTPException(404, _GONE)
    return store.archive_file(grant.name)


def _media_type(file: str) -> str:
    if file.endswith(".tar.gz"):
        return "application/gzip"
    return mimetypes.guess_type(file)[0] or "application/octet-stream"
