"""Saved checkpoints: lists, publishing, expiry, copies, uploads, links to their files."""

from __future__ import annotations

from email.utils import format_datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from mint_engine.errors import UserError
from mint_engine.server.archives import make_archive
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.once import once
from mint_engine.server.reading import body_of, read
from mint_engine.server.sdk import listed_kinds
from mint_engine.server.shares import files
from mint_engine.server.signed_urls import Grant, version_of
from mint_engine.server.state import ServerState, get_state
from mint_engine.store import ResolvedCheckpoint
from mint_engine.types import CheckpointsListResponse, WeightsInfoResponse
from mint_engine.wire.requests import CopyWeightsRequest, SetTtlRequest, WeightsInfoRequest

router = APIRouter(tags=["checkpoints"])

Who = Annotated[Caller, Depends(get_caller)]
State = Annotated[ServerState, Depends(get_state)]
# A checkpoint's id, "weights/<name>", is two parts of a URL: so a checkpoint may be called "publish".
ONE = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


def _path(run_id: str, kind: str, name: str) -> str:
    return f"tinker://{run_id}/{kind}/{name}"


Path_ = Annotated[str, Depends(_path)]


# ---- lists and what is known -----------------------------------------------------------------------------------------


@router.get("/checkpoints")
async def list_user_checkpoints(
    caller: Who,
    request: Request,
    limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> CheckpointsListResponse:
    """The checkpoints of all runs of the caller, newest first."""
    kinds = listed_kinds(request)
    return await run_in_threadpool(lambda: caller.store.list_user_checkpoints(limit, offset, kinds=kinds))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_checkpoints(caller: Who, request: Request, run_id: str) -> CheckpointsListResponse:
    """The checkpoints of a run, newest first; of another's run the published ones."""
    kinds = listed_kinds(request)
    return await run_in_threadpool(lambda: caller.store.list_checkpoints(run_id, "accessible", kinds))


@router.post("/weights_info", openapi_extra=body_of(WeightsInfoRequest))
async def weights_info(caller: Who, state: State, request: Request) -> WeightsInfoResponse:
    """What is needed to build a model that a checkpoint fits."""
    body = await read(WeightsInfoRequest, request, caller, state)
    return await run_in_threadpool(caller.store.weights_info, body.tinker_path)


# ---- changes ---------------------------------------------------------------------------------------------------------


@router.post(f"{ONE}/publish")
async def publish(caller: Who, path: Path_) -> dict[str, Any]:
    """Let every key read it. Fine if it is public already."""
    await run_in_threadpool(caller.store.publish, path)
    return {}


@router.delete(f"{ONE}/publish")
async def unpublish(caller: Who, path: Path_) -> dict[str, Any]:
    await run_in_threadpool(caller.store.unpublish, path)
    return {}


@router.put(f"{ONE}/ttl", openapi_extra=body_of(SetTtlRequest))
async def set_ttl(caller: Who, state: State, request: Request, path: Path_) -> dict[str, Any]:
    """Let it expire in `ttl_seconds` from now, or never (null)."""
    body = await read(SetTtlRequest, request, caller, state)
    await run_in_threadpool(caller.store.set_ttl, path, body.ttl_seconds)
    return {}


@router.delete(ONE)
async def delete_checkpoint(caller: Who, request: Request, path: Path_) -> dict[str, Any]:
    await once(request, caller.owner, "", lambda: run_in_threadpool(caller.store.delete_checkpoint, path))
    return {}


@router.post("/copy_weights", openapi_extra=body_of(CopyWeightsRequest))
async def copy_weights(caller: Who, state: State, request: Request) -> dict[str, str]:
    """A checkpoint of the caller's own, or a published one, as a new run of the caller's."""
    body = await read(CopyWeightsRequest, request, caller, state)
    if body.session_id is not None:
        await state.sessions.check(caller, body.session_id)
        if body.model_seq_id is None:
            raise UserError("model_seq_id: expected a number beside session_id, got none")
    token = body.weights_access_token or request.headers.get("x-tinker-weights-access-token")
    reader = await state.auth.reader(caller, token)

    async def copy() -> str:
        source = await run_in_threadpool(reader.resolve, body.source_path)
        await state.auth.quotas.check_disk(caller, source.record.size_bytes)
        return await files.run(
            caller.owner,
            lambda: caller.store.copy_checkpoint(
                source.tinker_path,
                reader=reader,
                session_id=body.session_id,
                model_seq_id=body.model_seq_id,
                project_id=body.destination_project_id,
                ttl_seconds=body.ttl_seconds,
            ),
        )

    path = await once(request, caller.owner, body.model_dump_json(), copy)
    return {"tinker_path": path}


# ---- links -----------------------------------------------------------------------------------------------------------


@router.get(f"{ONE}/archive", response_model=None, responses={302: {"description": "To the archive."}})
async def archive(caller: Who, state: State, request: Request, path: Path_) -> Response:
    """A link to a tar.gz of the PEFT adapter: as JSON `{url, expires}` to who accepts that, else as a redirect.

    SDKs up to 0.22 send two Accept headers, their default application/json and application/gzip: they mean the second.
    """
    found = await make_archive(request, caller.store, path)
    grant = Grant(caller.owner, "archive", found.tinker_path, f"{found.name}.tar.gz", version_of(found.directory))
    url, expires = state.signer.link(request, grant)
    accepted = ",".join(request.headers.getlist("accept"))
    if "application/json" in accepted and "application/gzip" not in accepted:
        return JSONResponse({"url": url, "expires": expires.isoformat()})
    return Response(status_code=302, headers={"Location": url, "Expires": format_datetime(expires, usegmt=True)})


@router.get(f"{ONE}/external_weights_urls")
async def external_weights_urls(caller: Who, state: State, request: Request, path: Path_) -> dict[str, Any]:
    """A link to each file of a checkpoint made by `save_weights_external`."""
    found = await run_in_threadpool(caller.store.resolve, path)
    if found.kind != "external_weights":
        raise UserError(f"{found.tinker_path}: expected a checkpoint under external_weights, got {found.kind}")
    files = await run_in_threadpool(files_of, found)
    version = version_of(found.directory)
    links = {
        file: state.signer.link(request, Grant(caller.owner, "file", found.tinker_path, file, version))
        for file in files
    }
    return {"urls": {file: url for file, (url, _) in links.items()}, "expires": min(e for _, e in links.values())}


def files_of(checkpoint: ResolvedCheckpoint) -> list[str]:
    """The names of a checkpoint's files."""
    return sorted(path.name for path in checkpoint.directory.iterdir() if path.is_file() and path.name[0] != ".")


@router.get(ONE)
async def get_checkpoint(caller: Who, path: Path_) -> dict[str, Any]:
    """One checkpoint as the lists show it."""
    found = await run_in_threadpool(caller.store.resolve, path)
    return found.record.public_view().model_dump(mode="json")
