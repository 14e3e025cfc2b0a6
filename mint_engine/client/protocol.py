"""What the clients need of an engine, whether it runs in this process or on a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import date
from typing import TYPE_CHECKING, Any, Protocol

from mint_engine.types import (
    AccessScope,
    AdamParams,
    AuditEventType,
    AuditLogResponse,
    BillingUsageResponse,
    CheckpointArchiveUrlResponse,
    CheckpointsListResponse,
    CurrentCheckpointStorageUsageResponse,
    Datum,
    ExternalWeightsUrlsResponse,
    FinishReason,
    ForwardBackwardOutput,
    GetBillingUsageRequest,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    InterpolateCheckpointsResponse,
    ListSessionsResponse,
    LoadWeightsResponse,
    LoraConfig,
    ModelInput,
    OptimStepResponse,
    ReverseKLDatum,
    ReverseKLOutput,
    SampleResponse,
    SamplingParams,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    SessionSearchRequest,
    SessionSearchResponse,
    TensorData,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mint_engine.client.remote import RemoteEngine
    from mint_engine.custom_loss import CustomLoss
    from mint_engine.engine import Engine


# (which of the call's samples, token, log-probability under the tempered distribution)
OnToken = Callable[[int, int, float], None]


class ClientEngine(Protocol):
    """Training and sampling. Calls that give a future return at once; those of one model run in order."""

    def create_session(
        self, *, tags: Sequence[str] = (), user_metadata: dict[str, str] | None = None, project_id: str | None = None,
        display_name: str | None = None,
    ) -> str: ...  # fmt: skip

    def create_model(
        self, session_id: str, base_model: str, lora: LoraConfig, *, user_metadata: dict[str, str] | None = None
    ) -> Future[str]: ...

    def create_model_from_state(
        self, session_id: str, path: str, *, optimizer: bool, base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[str]: ...  # fmt: skip

    def unload_model(self, model_id: str) -> Future[None]: ...

    def get_info(self, model_id: str) -> GetInfoResponse: ...

    def forward(
        self, model_id: str, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]: ...

    def forward_backward(
        self, model_id: str, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]: ...

    def forward_backward_custom(
        self, model_id: str, data: Sequence[Datum], fn: CustomLoss
    ) -> Future[ForwardBackwardOutput]: ...

    def forward_backward_reverse_kl(
        self, model_id: str, data: Sequence[ReverseKLDatum], *, reference_model_path: str, temperature: float
    ) -> Future[ReverseKLOutput]: ...

    def optim_step(self, model_id: str, adam_params: AdamParams) -> Future[OptimStepResponse]: ...

    def save_weights(
        self, model_id: str, name: str, *, ttl_seconds: int | None = None, overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]: ...  # fmt: skip

    def load_weights(self, model_id: str, path: str, *, optimizer: bool) -> Future[LoadWeightsResponse]: ...

    def save_weights_for_sampler(
        self, model_id: str, name: str | None = None, *, ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None, overwrite: bool = False, sampler: bool | None = None,
    ) -> Future[SaveWeightsForSamplerResponse]: ...  # fmt: skip

    def save_weights_external(
        self, model_id: str, name: str, *, ttl_seconds: int | None = None, recipients: list[str] | None = None
    ) -> Future[SaveWeightsExternalResponse]: ...

    def create_sampler(
        self, session_id: str, *, model_path: str | None = None, base_model: str | None = None
    ) -> Future[str]: ...

    def get_sampler(self, sampler_id: str) -> GetSamplerResponse: ...

    def sample(
        self, sampler_id: str, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams, *,
        include_prompt_logprobs: bool = False, topk_prompt_logprobs: int = 0, topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None, prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None, on_token: OnToken | None = None,
    ) -> Future[SampleResponse]: ...  # fmt: skip

    def cancel_sample(self, future: Future[SampleResponse]) -> bool: ...

    def release(self, identifier: str) -> None: ...

    def tokenizer(self, base_model: str) -> PreTrainedTokenizerBase: ...

    def capabilities(self) -> GetServerCapabilitiesResponse: ...


class Registry(Protocol):
    """What is stored: sessions, runs, checkpoints. A path is any form of a checkpoint's name that the store takes."""

    def capabilities(self) -> Future[GetServerCapabilitiesResponse]: ...

    def finish_session(self, session_id: str, status: FinishReason, detail: str | None) -> Future[None]: ...

    def get_run(self, run_id: str, access_scope: AccessScope) -> Future[TrainingRun]: ...

    def get_run_of(self, path: str, access_scope: AccessScope) -> Future[TrainingRun]: ...

    def list_runs(
        self, limit: int, offset: int, access_scope: AccessScope, project_id: str | None
    ) -> Future[TrainingRunsResponse]: ...

    def list_sessions(self, limit: int, offset: int, access_scope: AccessScope) -> Future[ListSessionsResponse]: ...

    def get_session(self, session_id: str, access_scope: AccessScope) -> Future[GetSessionResponse]: ...

    def search_sessions(self, request: SessionSearchRequest) -> Future[SessionSearchResponse]: ...

    def assign_project(self, session_id: str, project_id: str) -> Future[None]: ...

    def get_sampler(self, sampler_id: str) -> Future[GetSamplerResponse]: ...

    def whoami(self) -> Future[WhoamiResponse]: ...

    def audit_log(self, event_type: AuditEventType, day: date | None) -> Future[AuditLogResponse]: ...

    def billing_usage(self, request: GetBillingUsageRequest) -> Future[BillingUsageResponse]: ...

    def storage_usage(self, project_id: str | None) -> Future[CurrentCheckpointStorageUsageResponse]: ...

    def session_trace(self, session_id: str) -> Future[str]: ...

    def list_checkpoints(self, run_id: str) -> Future[CheckpointsListResponse]: ...

    def list_user_checkpoints(self, limit: int, offset: int) -> Future[CheckpointsListResponse]: ...

    def weights_info(self, path: str) -> Future[WeightsInfoResponse]: ...

    def delete_checkpoint(self, path: str) -> Future[None]: ...

    def publish(self, path: str) -> Future[None]: ...

    def unpublish(self, path: str) -> Future[None]: ...

    def set_ttl(self, path: str, ttl_seconds: int | None) -> Future[None]: ...

    def archive(self, path: str) -> Future[CheckpointArchiveUrlResponse]: ...

    def external_weights_urls(self, path: str) -> Future[ExternalWeightsUrlsResponse]: ...

    def copy_weights(
        self, path: str, *, session_id: str | None, project_id: str | None, ttl_seconds: int | None,
        weights_access_token: str | None,
    ) -> Future[str]: ...  # fmt: skip

    def interpolate(
        self, source_paths: Sequence[str], coefficients: Sequence[float], output_name: str | None
    ) -> Future[InterpolateCheckpointsResponse]: ...


if TYPE_CHECKING:
    # Both kinds of engine fit: mypy says so here if one does not.
    from mint_engine.client.local import LocalRegistry
    from mint_engine.client.remote.registry import RemoteRegistry

    def _engines(local: Engine, remote: RemoteEngine) -> tuple[ClientEngine, ClientEngine]:
        return local, remote

    def _registries(local: LocalRegistry, remote: RemoteRegistry) -> tuple[Registry, Registry]:
        return local, remote
