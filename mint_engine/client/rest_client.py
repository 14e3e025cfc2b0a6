"""`RestClient`: sessions, training runs and checkpoints that are stored."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mint_engine.client.connection import open_engine
from mint_engine.client.futures import APIFuture, value_twin
from mint_engine.errors import UserError
from mint_engine.store import ARCHIVE_SECONDS
from mint_engine.types import (
    CheckpointArchiveUrlResponse,
    CheckpointsListResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)

if TYPE_CHECKING:
    from mint_engine.engine import Engine

T = TypeVar("T")
AccessScope = Literal["owned", "accessible"]

# Disk reads and writes, off the caller's thread so that an event loop is never blocked. Threads start on first use.
_pool = ThreadPoolExecutor(2, thread_name_prefix="mint-rest")


class RestClient:
    """Lists, inspects and removes what is stored under the engine's home.

    Every method answers an `APIFuture` of its result; its `_async` twin gives the result when awaited. On a local
    engine everything is the caller's own, so both access scopes mean the same.

    Args: as of `ServiceClient`. No session is made.
    """

    def __init__(
        self, engine: Engine | None = None, *, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        self._engine = engine if engine is not None else open_engine(base_url=base_url, dtype=None)
        self._store = self._engine.store

    def get_telemetry(self) -> None:
        """Nothing is reported to anybody: None."""

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        return _submit(self._engine.capabilities)

    # ---- runs and sessions ---------------------------------------------------------------------------------------

    def get_training_run(self, training_run_id: str, access_scope: AccessScope = "owned") -> APIFuture[TrainingRun]:
        _check_scope(access_scope)
        return _submit(self._store.get_run, training_run_id)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[TrainingRun]:
        """The run that a checkpoint belongs to."""
        _check_scope(access_scope)
        return _submit(lambda: self._store.get_run(self._store.resolve(tinker_path).training_run_id))

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned", project_id: str | None = None
    ) -> APIFuture[TrainingRunsResponse]:
        """Those used last first."""
        _check_scope(access_scope)
        return _submit(self._store.list_runs, limit, offset, project_id)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """Newest first."""
        _check_scope(access_scope)
        return _submit(self._store.list_sessions, limit, offset)

    def get_session(self, session_id: str, access_scope: AccessScope = "owned") -> APIFuture[GetSessionResponse]:
        _check_scope(access_scope)
        return _submit(self._store.get_session, session_id)

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        return _submit(lambda: self._store.update_session(session_id, project_id=project_id))

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        return _submit(self._store.get_sampler, sampler_id)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """The checkpoints of a run, newest first."""
        return _submit(self._store.list_checkpoints, training_run_id)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        """The checkpoints of all runs, newest first."""
        return _submit(self._store.list_user_checkpoints, limit, offset)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        return _submit(self._store.weights_info, tinker_path)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """`checkpoint_id`: as in the lists, `weights/<name>` or `sampler_weights/<name>`."""
        return self.delete_checkpoint_from_tinker_path(f"tinker://{training_run_id}/{checkpoint_id}")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return _submit(self._store.delete_checkpoint, tinker_path)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Mark a checkpoint as public."""
        return _submit(self._store.publish, tinker_path)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return _submit(self._store.unpublish, tinker_path)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """Let a checkpoint expire so many seconds from now, or never (None)."""
        return _submit(self._store.set_ttl, tinker_path, ttl_seconds)

    def get_checkpoint_archive_url(
        self, training_run_id: str, checkpoint_id: str
    ) -> APIFuture[CheckpointArchiveUrlResponse]:
        return self.get_checkpoint_archive_url_from_tinker_path(f"tinker://{training_run_id}/{checkpoint_id}")

    def get_checkpoint_archive_url_from_tinker_path(self, tinker_path: str) -> APIFuture[CheckpointArchiveUrlResponse]:
        """A `file://` URL of a tar.gz of the PEFT adapter."""
        return _submit(self._archive, tinker_path)

    get_server_capabilities_async = value_twin(get_server_capabilities)
    get_training_run_async = value_twin(get_training_run)
    get_training_run_by_tinker_path_async = value_twin(get_training_run_by_tinker_path)
    list_training_runs_async = value_twin(list_training_runs)
    list_sessions_async = value_twin(list_sessions)
    get_session_async = value_twin(get_session)
    assign_session_project_async = value_twin(assign_session_project)
    get_sampler_async = value_twin(get_sampler)
    list_checkpoints_async = value_twin(list_checkpoints)
    list_user_checkpoints_async = value_twin(list_user_checkpoints)
    get_weights_info_by_tinker_path_async = value_twin(get_weights_info_by_tinker_path)
    delete_checkpoint_async = value_twin(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = value_twin(delete_checkpoint_from_tinker_path)
    publish_checkpoint_from_tinker_path_async = value_twin(publish_checkpoint_from_tinker_path)
    unpublish_checkpoint_from_tinker_path_async = value_twin(unpublish_checkpoint_from_tinker_path)
    set_checkpoint_ttl_from_tinker_path_async = value_twin(set_checkpoint_ttl_from_tinker_path)
    get_checkpoint_archive_url_async = value_twin(get_checkpoint_archive_url)
    get_checkpoint_archive_url_from_tinker_path_async = value_twin(get_checkpoint_archive_url_from_tinker_path)

    def _archive(self, tinker_path: str) -> CheckpointArchiveUrlResponse:
        expires = datetime.now(UTC) + timedelta(seconds=ARCHIVE_SECONDS)
        return CheckpointArchiveUrlResponse(url=self._store.archive(tinker_path), expires=expires)


def _submit(fn: Callable[..., T], *args: Any) -> APIFuture[T]:
    return APIFuture(_pool.submit(fn, *args))


def _check_scope(access_scope: str) -> None:
    if access_scope not in ("owned", "accessible"):
        raise UserError(f"access_scope: expected 'owned' or 'accessible', got {access_scope!r}")
