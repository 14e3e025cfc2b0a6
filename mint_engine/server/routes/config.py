"""What a client is told about the server before it does anything."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.reading import body_of, read
from mint_engine.server.state import ServerState, get_state
from mint_engine.types import GetServerCapabilitiesResponse
from mint_engine.wire.requests import ClientConfigRequest

router = APIRouter(tags=["configuration"])

CallerOf = Annotated[Caller, Depends(get_caller)]
State = Annotated[ServerState, Depends(get_state)]

CONFIG_REFRESH_S = 300

# What the SDKs put into one request by themselves: estimated bytes of its numbers (4 a token), and datums.
_CHUNK_BYTES = 5_000_000
_CHUNK_DATUMS = 1024
# Half of a body is for the numbers, which JSON may spell with six times their bytes, half for what is around them.
_BODY_OF_NUMBERS = 12
_BODY_OF_A_DATUM = 2 * 1024


@router.post("/client/config", openapi_extra=body_of(ClientConfigRequest))
async def client_config(request: Request, caller: CallerOf, state: State) -> dict[str, Any]:
    """Flags of the SDKs, one superset for all versions (wire-protocol.md 2.2)."""
    version = _version((await read(ClientConfigRequest, request, caller, state)).sdk_version)
    settings = state.settings
    body = state.auth.quotas.limits(caller).request_bytes or settings.max_request_bytes
    return {
        # mindlab-toolkit's keys work with tinker 0.22 only by way of a token; tinker 0.38 refuses them itself.
        "pjwt_auth_enabled": request.headers.get("x-api-key", "").startswith("sk-"),
        "credential_default_source": "api_key",
        "parallel_fwdbwd_chunks": True,
        "proto_write_fwdbwd": False,
        "proto_compress_fwdbwd": settings.compress_uploads,
        "fwdbwd_max_chunk_bytes_count": max(1, min(_CHUNK_BYTES, body // _BODY_OF_NUMBERS)),
        "fwdbwd_max_chunk_len": max(1, min(_CHUNK_DATUMS, body // _BODY_OF_A_DATUM)),
        # Until 0.22 archives come by a redirect, which that transport follows by itself, and fails.
        "use_pyqwest_transport": version >= (0, 23),
        "sample_max_concurrent_requests": settings.sample_max_concurrent_requests,
        "sample_use_retrieve_futures": settings.batch_polling,
        "sample_join_sampling_session": settings.join_samplers,
        "sample_enable_stuck_detection": True,
        "custom_loss_server_side": False,
    }


@router.post("/client/dynamic_config", openapi_extra=body_of(ClientConfigRequest))
async def dynamic_config(request: Request, caller: CallerOf, state: State) -> dict[str, Any]:
    """Flags that a running 0.38 client fetches anew every few minutes."""
    await read(ClientConfigRequest, request, caller, state)
    return {
        "refresh_interval_sec": CONFIG_REFRESH_S,
        "sample_cancel_enabled": state.settings.cancel_samples,
        "sample_cancel_max_batch_size": 64,
    }


@router.get("/get_server_capabilities")
async def get_server_capabilities(caller: CallerOf, state: State) -> GetServerCapabilitiesResponse:
    """The base models served."""
    return state.served.capabilities()


def _version(text: str) -> tuple[int, int]:
    """(major, minor); what cannot be read is taken for an old one, which has every workaround."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
