"""Sessions, runs and checkpoints on a server: what `RestClient` asks for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from mint_engine.client.remote.account import Account
from mint_engine.client.remote.asking import Submit, route_of
from mint_engine.client.remote.failures import LostPromiseError, unreadable
from mint_engine.client.remote.promises import Promise, lost, retrieve
from mint_engine.client.remote.transport import Transport, answer_as, json_object
from mint_engine.errors import NotFoundError, UserError
from mint_engine.types import (
    AccessScope,
    Checkpoint,
    CheckpointArchiveUrlResponse,
    CheckpointsListResponse,
    ExternalWeightsUrlsResponse,
    FinishReason,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    InterpolateCheckpointsResponse,
    ListSessionsResponse,
    ParsedCheckpointTinkerPath,
    SessionSearchRequest,
    SessionSearchResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from mint_engine.types.records import strip_scheme

_PAGE = 1000
_LINK_MINUTES = 15  # of a link that does not say how long it lives


class RemoteRegistry(Account):
    """Args: `finish` ends a session of this connection; `next_model` counts a session's models."""

    def __init__(
        self,
        transport: Transport,
        submit: Submit,
        finish: Callable[[str, FinishReason, str | None], Awaitable[None]],
        next_model: Callable[[str], int],
    ) -> None:
        super().__init__(transport, submit)
        self._finish, self._next_model = finish, next_model

    def capabilities(self) -> Future[GetServerCapabilitiesResponse]:
        return self._get(GetServerCapabilitiesResponse, "get_server_capabilities")

    # ---- sessions and runs ---------------------------------------------------------------------------------------

    def finish_session(self, session_id: str, status: FinishReason, detail: str | None) -> Future[None]:
        async def run() -> None:
            await self._finish(session_id, status, detail)

        return self._submit(run)

    def get_run(self, run_id: str, access_scope: AccessScope) -> Future[TrainingRun]:
        return self._get(TrainingRun, "training_runs", run_id, access_scope=access_scope)

    def get_run_of(self, path: str, access_scope: AccessScope) -> Future[TrainingRun]:
        async def run() -> TrainingRun:
            found = await self._find(path)
            route = route_of("training_runs", found.training_run_id)
            return answer_as(
                TrainingRun, await self._transport.send("GET", route, params={"access_scope": access_scope})
            )

        return self._submit(run)

    def list_runs(
        self, limit: int, offset: int, access_scope: AccessScope, project_id: str | None
    ) -> Future[TrainingRunsResponse]:
        return self._get(
            TrainingRunsResponse, "training_runs", limit=limit, offset=offset, access_scope=access_scope,
            project_id=project_id,
        )  # fmt: skip

    def list_sessions(self, limit: int, offset: int, access_scope: AccessScope) -> Future[ListSessionsResponse]:
        return self._get(ListSessionsResponse, "sessions", limit=limit, offset=offset, access_scope=access_scope)

    def get_session(self, session_id: str, access_scope: AccessScope) -> Future[GetSessionResponse]:
        return self._get(GetSessionResponse, "sessions", session_id, access_scope=access_scope)

    def search_sessions(self, request: SessionSearchRequest) -> Future[SessionSearchResponse]:
        body = request.model_dump(mode="json", exclude_none=True)

        async def run() -> SessionSearchResponse:
            return answer_as(SessionSearchResponse, await self._transport.post("sessions/search", body))

        return self._submit(run)

    def assign_project(self, session_id: str, project_id: str) -> Future[None]:
        async def run() -> None:
            await self._transport.post(
                route_of("sessions", session_id, "project"), {"project_id": project_id}, method="PUT"
            )

        return self._submit(run)

    def get_sampler(self, sampler_id: str) -> Future[GetSamplerResponse]:
        return self._get(GetSamplerResponse, "samplers", sampler_id)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def list_checkpoints(self, run_id: str) -> Future[CheckpointsListResponse]:
        return self._get(CheckpointsListResponse, "training_runs", run_id, "checkpoints")

    def list_user_checkpoints(self, limit: int, offset: int) -> Future[CheckpointsListResponse]:
        return self._get(CheckpointsListResponse, "checkpoints", limit=limit, offset=offset)

    def weights_info(self, path: str) -> Future[WeightsInfoResponse]:
        async def run() -> WeightsInfoResponse:
            return answer_as(WeightsInfoResponse, await self._transport.post("weights_info", {"tinker_path": path}))

        return self._submit(run)

    def delete_checkpoint(self, path: str) -> Future[None]:
        return self._change("DELETE", path, "")

    def publish(self, path: str) -> Future[None]:
        return self._change("POST", path, "/publish")

    def unpublish(self, path: str) -> Future[None]:
        return self._change("DELETE", path, "/publish")

    def set_ttl(self, path: str, ttl_seconds: int | None) -> Future[None]:
        async def run() -> None:
            route = f"{await self._checkpoint(path)}/ttl"
            await self._transport.post(route, {"ttl_seconds": ttl_seconds}, method="PUT")

        return self._submit(run)

    def archive(self, path: str) -> Future[CheckpointArchiveUrlResponse]:
        async def run() -> CheckpointArchiveUrlResponse:
            answer = await self._transport.send(
                "GET", f"{await self._checkpoint(path, 'sampler_weights')}/archive", expect_status=frozenset({302, 307})
            )
            if answer.is_redirect:
                return CheckpointArchiveUrlResponse(url=answer.headers["location"], expires=_expiry(answer))
            return answer_as(CheckpointArchiveUrlResponse, answer)

        return self._submit(run)

    def external_weights_urls(self, path: str) -> Future[ExternalWeightsUrlsResponse]:
        async def run() -> ExternalWeightsUrlsResponse:
            answer = await self._transport.send("GET", f"{await self._checkpoint(path)}/external_weights_urls")
            return answer_as(ExternalWeightsUrlsResponse, answer)

        return self._submit(run)

    def copy_weights(
        self, path: str, *, session_id: str | None, project_id: str | None, ttl_seconds: int | None,
        weights_access_token: str | None,
    ) -> Future[str]:  # fmt: skip
        body = {
            "source_path": path, "session_id": session_id, "destination_project_id": project_id,
            "model_seq_id": None if session_id is None else self._next_model(session_id), "ttl_seconds": ttl_seconds,
            "weights_access_token": weights_access_token,
        }  # fmt: skip
        headers = {} if weights_access_token is None else {"X-Tinker-Weights-Access-Token": weights_access_token}

        async def run() -> str:
            given = {name: value for name, value in body.items() if value is not None}
            answer = await self._transport.post("copy_weights", given, headers=headers)
            if not isinstance(copied := json_object(answer).get("tinker_path"), str):
                raise unreadable(answer, "the copy's tinker_path")
            return copied

        return self._submit(run)

    def interpolate(
        self, source_paths: Sequence[str], coefficients: Sequence[float], output_name: str | None
    ) -> Future[InterpolateCheckpointsResponse]:
        body = {
            "source_paths": list(source_paths), "coefficients": [float(c) for c in coefficients],
            "output_path": output_name, "output_checkpoint_type": "sampler", "type": "mint_interpolate_checkpoints",
        }  # fmt: skip

        async def run() -> InterpolateCheckpointsResponse:
            response = await self._transport.post("mint/checkpoints/interpolate", body)
            promise = Promise.of(response, "MintInterpolateCheckpoints")
            try:
                answer = await retrieve(self._transport, promise)
            except LostPromiseError as error:  # not asked again: it may be there, and would be there twice
                raise lost(promise, error) from error
            return answer_as(InterpolateCheckpointsResponse, answer)

        return self._submit(run)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _change(self, method: str, path: str, what: str) -> Future[None]:
        async def run() -> None:
            await self._transport.send(method, f"{await self._checkpoint(path)}{what}")

        return self._submit(run)

    async def _checkpoint(self, path: str, prefer: str | None = None) -> str:
        found = await self._find(path, prefer)
        return route_of("training_runs", found.training_run_id, "checkpoints", *found.checkpoint_id.split("/"))

    async def _find(self, path: str, prefer: str | None = None) -> ParsedCheckpointTinkerPath:
        """A checkpoint's full name; the short forms `<run>/<name>` and `<name>` are looked up among one's own."""
        if not isinstance(path, str) or strip_scheme(path).count("/") >= 2:
            return ParsedCheckpointTinkerPath.from_tinker_path(path)
        run_id, _, name = strip_scheme(path).rpartition("/")
        matches = [c async for c in self._all_checkpoints(run_id) if c.tinker_path.rpartition("/")[2] == name]
        if prefer is not None and len(matches) > 1:
            matches = [c for c in matches if c.checkpoint_id.startswith(f"{prefer}/")] or matches
        if not matches:
            raise NotFoundError(f"there is no checkpoint {path!r}")
        if len(matches) > 1:
            raise UserError(f"path: {path!r} fits several: {', '.join(c.tinker_path for c in matches)}")
        return ParsedCheckpointTinkerPath.from_tinker_path(matches[0].tinker_path)

    async def _all_checkpoints(self, run_id: str) -> AsyncIterator[Checkpoint]:
        route = route_of("training_runs", run_id, "checkpoints") if run_id else "checkpoints"
        offset = 0
        while True:
            params: dict[str, Any] = {} if run_id else {"limit": _PAGE, "offset": offset}
            page = answer_as(CheckpointsListResponse, await self._transport.send("GET", route, params=params))
            for checkpoint in page.checkpoints:
                yield checkpoint
            offset += _PAGE
            if run_id or len(page.checkpoints) < _PAGE:
                return


def _expiry(answer: httpx.Response) -> datetime:
    try:
        return parsedate_to_datetime(answer.headers["expires"])
    except (KeyError, ValueError):
        return datetime.now(UTC) + timedelta(minutes=_LINK_MINUTES)
