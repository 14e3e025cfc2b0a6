"""`RestClient`: sessions, training runs and checkpoints that are stored."""

from __future__ import annotations

from collections.abc import Sequence

from mint_engine.client.admin_client import AdminClient
from mint_engine.client.futures import APIFuture, value_twin
from mint_engine.errors import UserError
from mint_engine.types import (
    AccessScope,
    CheckpointArchiveUrlResponse,
    CheckpointsListResponse,
    ExternalWeightsUrlsResponse,
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


class RestClient(AdminClient):
    """Lists, inspects and removes what is stored: on a server, or under the engine's home.

    Every method answers an `APIFuture` of its result; its `_async` twin gives the result when awaited. `access_scope`:
    what is the caller's own, or also what others have published. On a local engine everything is the caller's own.

    Args: as of `ServiceClient`. No session is made.
    """

    def get_server_capabilities(self) -> APIFuture[GetServerCapabilitiesResponse]:
        return APIFuture(self._registry.capabilities())

    def whoami(self) -> APIFuture[WhoamiResponse]:
        """Who owns what the caller makes: a key, or "local" where none was asked for."""
        return APIFuture(self._registry.whoami())

    # ---- runs and sessions ---------------------------------------------------------------------------------------

    def get_training_run(self, training_run_id: str, access_scope: AccessScope = "owned") -> APIFuture[TrainingRun]:
        _check_scope(access_scope)
        return APIFuture(self._registry.get_run(training_run_id, access_scope))

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[TrainingRun]:
        """The run that a checkpoint belongs to."""
        _check_scope(access_scope)
        return APIFuture(self._registry.get_run_of(tinker_path, access_scope))

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned", project_id: str | None = None
    ) -> APIFuture[TrainingRunsResponse]:
        """Those used last first."""
        _check_scope(access_scope)
        return APIFuture(self._registry.list_runs(limit, offset, access_scope, project_id))

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """Newest first."""
        _check_scope(access_scope)
        return APIFuture(self._registry.list_sessions(limit, offset, access_scope))

    def get_session(self, session_id: str, access_scope: AccessScope = "owned") -> APIFuture[GetSessionResponse]:
        _check_scope(access_scope)
        return APIFuture(self._registry.get_session(session_id, access_scope))

    def search_sessions(self, request: SessionSearchRequest | None = None) -> APIFuture[SessionSearchResponse]:
        """A page of the sessions that fit, newest first; None = all."""
        return APIFuture(self._registry.search_sessions(request or SessionSearchRequest()))

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        return APIFuture(self._registry.assign_project(session_id, project_id))

    def export_session_trace(self, session_id: str) -> APIFuture[str]:
        """A URL of the session's requests as a timeline: JSON for https://ui.perfetto.dev and chrome://tracing.

        A server's link is good for an hour. It is made of the requests to a server, so an engine in this process has
        one (a `file://` URL) only of sessions that a server on the same home had, and raises UserError for others.
        """
        return APIFuture(self._registry.session_trace(session_id))

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        return APIFuture(self._registry.get_sampler(sampler_id))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """The checkpoints of a run, newest first."""
        return APIFuture(self._registry.list_checkpoints(training_run_id))

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        """The checkpoints of all runs, newest first."""
        return APIFuture(self._registry.list_user_checkpoints(limit, offset))

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        return APIFuture(self._registry.weights_info(tinker_path))

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """`checkpoint_id`: as in the lists, `weights/<name>` or `sampler_weights/<name>`."""
        return self.delete_checkpoint_from_tinker_path(f"tinker://{training_run_id}/{checkpoint_id}")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return APIFuture(self._registry.delete_checkpoint(tinker_path))

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Let everybody read a checkpoint."""
        return APIFuture(self._registry.publish(tinker_path))

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        return APIFuture(self._registry.unpublish(tinker_path))

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """Let a checkpoint expire so many seconds from now, or never (None)."""
        return APIFuture(self._registry.set_ttl(tinker_path, ttl_seconds))

    def get_checkpoint_archive_url(
        self, training_run_id: str, checkpoint_id: str
    ) -> APIFuture[CheckpointArchiveUrlResponse]:
        return self.get_checkpoint_archive_url_from_tinker_path(f"tinker://{training_run_id}/{checkpoint_id}")

    def get_checkpoint_archive_url_from_tinker_path(self, tinker_path: str) -> APIFuture[CheckpointArchiveUrlResponse]:
        """A URL of a tar.gz of the PEFT adapter: a `file://` one of an engine in this process."""
        return APIFuture(self._registry.archive(tinker_path))

    def get_external_weights_urls(self, tinker_path: str) -> APIFuture[ExternalWeightsUrlsResponse]:
        """A URL of each file of a checkpoint made by `save_weights_external`."""
        return APIFuture(self._registry.external_weights_urls(tinker_path))

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """A copy of one's own or of a published checkpoint, in a new training run. Gives its path."""
        future = self._registry.copy_weights(
            path,
            session_id=None,
            project_id=destination_project_id,
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )
        return APIFuture(future)

    def interpolate_checkpoints(
        self, source_paths: Sequence[str], coefficients: Sequence[float], output_name: str | None = None
    ) -> APIFuture[InterpolateCheckpointsResponse]:
        """A new sampler checkpoint whose change of the base model is the weighted sum of those of `source_paths`."""
        return APIFuture(self._registry.interpolate(source_paths, coefficients, output_name))

    get_server_capabilities_async = value_twin(get_server_capabilities)
    whoami_async = value_twin(whoami)
    get_training_run_async = value_twin(get_training_run)
    get_training_run_by_tinker_path_async = value_twin(get_training_run_by_tinker_path)
    list_training_runs_async = value_twin(list_training_runs)
    list_sessions_async = value_twin(list_sessions)
    get_session_async = value_twin(get_session)
    search_sessions_async = value_twin(search_sessions)
    assign_session_project_async = value_twin(assign_session_project)
    export_session_trace_async = value_twin(export_session_trace)
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
    get_external_weights_urls_async = value_twin(get_external_weights_urls)
    copy_weights_async = value_twin(copy_weights)
    interpolate_checkpoints_async = value_twin(interpolate_checkpoints)


def _check_scope(access_scope: str) -> None:
    if access_scope not in ("owned", "accessible"):
        raise UserError(f"access_scope: expected 'owned' or 'accessible', got {access_scope!r}")
