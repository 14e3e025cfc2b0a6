"""The registry of an engine in this process: its store, off the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mint_engine.errors import UserError
from mint_engine.types import (
    AccessScope,
    AuditEventType,
    AuditLogResponse,
    BillingUsageResponse,
    CheckpointArchiveUrlResponse,
    CheckpointsListResponse,
    CurrentCheckpointStorageUsageResponse,
    ExternalWeightsUrlsResponse,
    FinishReason,
    GetBillingUsageRequest,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    InterpolateCheckpointsResponse,
    ListSessionsResponse,
    SessionSearchRequest,
    SessionSearchResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)

if TYPE_CHECKING:
    from mint_engine.engine import Engine

T = TypeVar("T")

_FILE_LINKS = timedelta(hours=24)

# Disk reads and writes, so that an event loop is never blocked. Threads start on first use.
_pool = ThreadPoolExecutor(2, thread_name_prefix="mint-rest")


class LocalRegistry:
    """Whoever runs the engine owns all there is, so both access scopes mean what can be read."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._store = engine, engine.store

    def capabilities(self) -> Future[GetServerCapabilitiesResponse]:
        return _submit(self._engine.capabilities)

    def finish_session(self, session_id: str, status: FinishReason, detail: str | None) -> Future[None]:
        return _submit(self._store.finish_session, session_id, status, detail)

    def get_run(self, run_id: str, access_scope: AccessScope) -> Future[TrainingRun]:
        return _submit(self._store.get_run, run_id, access_scope)

    def get_run_of(self, path: str, access_scope: AccessScope) -> Future[TrainingRun]:
        return _submit(lambda: self._store.get_run(self._store.resolve(path).training_run_id, access_scope))

    def list_runs(
        self, limit: int, offset: int, access_scope: AccessScope, project_id: str | None
    ) -> Future[TrainingRunsResponse]:
        return _submit(self._store.list_runs, limit, offset, project_id, access_scope)

    def list_sessions(self, limit: int, offset: int, access_scope: AccessScope) -> Future[ListSessionsResponse]:
        return _submit(self._store.list_sessions, limit, offset, access_scope)

    def get_session(self, session_id: str, access_scope: AccessScope) -> Future[GetSessionResponse]:
        return _submit(self._store.get_session, session_id, access_scope)

    def search_sessions(self, request: SessionSearchRequest) -> Future[SessionSearchResponse]:
        return _submit(self._store.search_sessions, request)

    def assign_project(self, session_id: str, project_id: str) -> Future[None]:
        return _submit(lambda: self._store.update_session(session_id, project_id=project_id))

    def get_sampler(self, sampler_id: str) -> Future[GetSamplerResponse]:
        return _submit(self._store.get_sampler, sampler_id)

    def whoami(self) -> Future[WhoamiResponse]:
        return _submit(lambda: WhoamiResponse(user_urn=self._store.owner, org_urn="tml:organization:mint-engine"))

    def audit_log(self, event_type: AuditEventType, day: date | None) -> Future[AuditLogResponse]:
        return _submit(self._store.audit_log, event_type, day)

    def billing_usage(self, request: GetBillingUsageRequest) -> Future[BillingUsageResponse]:
        return _submit(lambda: BillingUsageResponse(data=[]))

    def storage_usage(self, project_id: str | None) -> Future[CurrentCheckpointStorageUsageResponse]:
        return _submit(self._store.storage_usage, project_id)

    def session_trace(self, session_id: str) -> Future[str]:
        """A `file://` URL of a file that is kept for a day."""
        return _submit(lambda: self._store.session_trace_file(session_id).resolve().as_uri())

    def list_checkpoints(self, run_id: str) -> Future[CheckpointsListResponse]:
        return _submit(self._store.list_checkpoints, run_id)

    def list_user_checkpoints(self, limit: int, offset: int) -> Future[CheckpointsListResponse]:
        return _submit(self._store.list_user_checkpoints, limit, offset)

    def weights_info(self, path: str) -> Future[WeightsInfoResponse]:
        return _submit(self._store.weights_info, path)

    def delete_checkpoint(self, path: str) -> Future[None]:
        return _submit(self._store.delete_checkpoint, path)

    def publish(self, path: str) -> Future[None]:
        return _submit(self._store.publish, path)

    def unpublish(self, path: str) -> Future[None]:
        return _submit(self._store.unpublish, path)

    def set_ttl(self, path: str, ttl_seconds: int | None) -> Future[None]:
        return _submit(self._store.set_ttl, path, ttl_seconds)

    def archive(self, path: str) -> Future[CheckpointArchiveUrlResponse]:
        """A `file://` URL of a tar.gz that is kept for a day."""

        def make() -> CheckpointArchiveUrlResponse:
            return CheckpointArchiveUrlResponse(url=self._store.archive(path), expires=_expiry())

        return _submit(make)

    def external_weights_urls(self, path: str) -> Future[ExternalWeightsUrlsResponse]:
        """`file://` URLs of the checkpoint's own files, there as long as the checkpoint is."""

        def find() -> ExternalWeightsUrlsResponse:
            found = self._store.resolve(path)
            if found.kind != "external_weights":
                raise UserError(f"{found.tinker_path}: expected a checkpoint under external_weights, got {found.kind}")
            files = sorted(file for file in found.directory.iterdir() if file.is_file() and file.name[0] != ".")
            return ExternalWeightsUrlsResponse(urls={f.name: f.resolve().as_uri() for f in files}, expires=_expiry())

        return _submit(find)

    def copy_weights(
        self, path: str, *, session_id: str | None, project_id: str | None, ttl_seconds: int | None,
        weights_access_token: str | None,
    ) -> Future[str]:  # fmt: skip
        return self._engine.copy_checkpoint(path, session_id=session_id, project_id=project_id, ttl_seconds=ttl_seconds)

    def interpolate(
        self, source_paths: Sequence[str], coefficients: Sequence[float], output_name: str | None
    ) -> Future[InterpolateCheckpointsResponse]:
        return self._engine.interpolate_checkpoints(
            self._store.owner, list(source_paths), list(coefficients), output_name=output_name
        )


def _submit(fn: Callable[..., T], *args: Any) -> Future[T]:
    return _pool.submit(fn, *args)


def _expiry() -> datetime:
    return datetime.now(UTC) + _FILE_LINKS
