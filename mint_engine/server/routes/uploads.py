"""`POST checkpoints/upload`: a PEFT adapter from outside becomes a checkpoint of the caller's."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from mint_engine.errors import UserError
from mint_engine.models.hub import resolve_model
from mint_engine.server import uploads
from mint_engine.server.adopt import adopt, named_base
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.state import ServerState, get_state
from mint_engine.store.names import check_name

router = APIRouter(tags=["checkpoints"])

_UNPACKED_PER_BYTE = 4  # adapters hardly shrink; one whose B is still zero shrinks to a half
_ABANDONED_SECONDS = 24 * 3600
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "tar.gz of a PEFT directory"},
                        "name": {"type": "string", "description": "of the checkpoint; made up if there is none"},
                    },
                }
            }
        },
    }
}


@router.post("/checkpoints/upload", openapi_extra=_FORM)
async def upload(
    request: Request,
    caller: Annotated[Caller, Depends(get_caller)],
    state: Annotated[ServerState, Depends(get_state)],
) -> dict[str, Any]:
    """The field `file` holds a tar.gz with `adapter_config.json` and `adapter_model.safetensors`. The base model named
    in the config must be one that is served here. Answers the path of a checkpoint that can be sampled and loaded."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UserError("expected a multipart/form-data body with a field `file`")
    async with request.form(max_files=1, max_fields=8, max_part_size=4096) as form:
        file, name = form.get("file"), form.get("name")
        if not isinstance(file, UploadFile):
            raise UserError("file: expected a tar.gz file in the form's field `file`, got none")
        if name is not None:
            check_name(str(name))
        async with state.auth.quotas.unpacking:  # an adapter is in memory while it is checked: one at a time
            return await run_in_threadpool(_take_in, state, caller, file.file, None if name is None else str(name))


def _take_in(state: ServerState, caller: Caller, file: BinaryIO, name: str | None) -> dict[str, Any]:
    quotas = state.auth.quotas
    limit = _UNPACKED_PER_BYTE * (quotas.limits(caller).request_bytes or state.settings.max_request_bytes)
    with _workspace(state.engine.home / "uploads") as work:
        size = uploads.unpack(file, work / "unpacked", max_bytes=limit)
        quotas.check_disk_now(caller, size)
        base_model = state.resolve_base(named_base(work / "unpacked"))
        directory = resolve_model(base_model, state.engine.home).directory
        lora = adopt(work / "unpacked", work / "adopted", base_model=base_model, base_directory=directory)
        path = caller.store.import_checkpoint(work / "adopted", base_model=base_model, lora=lora, name=name)
    return {
        "path": path,
        "tinker_path": path,
        "checkpoint_id": path.split("/", 3)[3],
        "base_model": base_model,
        "lora_rank": lora.rank,
    }


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A directory of its own, gone at the end. What a killed server left behind goes a day later."""
    parent.mkdir(exist_ok=True)
    for old in parent.iterdir():
        with suppress(FileNotFoundError):  # another process may be quicker
            if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent) as name:
        work = Path(name)
        (work / "unpacked").mkdir()
        (work / "adopted").mkdir()
        yield work
