"""A caller's account: who they are, what they did with checkpoints, what they used and what they have stored."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AwareDatetime, Field, model_validator

from mint_engine.types.base import RequestModel, ResponseModel

AuditEventType: TypeAlias = Literal["all", "checkpoints", "projects", "teams", "organizations"]


class WhoamiResponse(ResponseModel):
    """`user_urn`: the owner of what the caller makes, a key's id or "local". `email`: the key's name here."""

    user_urn: str
    org_urn: str
    email: str | None = None


class AuditLogEntry(ResponseModel):
    """`event`: checkpoint_saved or checkpoint_read. `event_details`: the request, and why it failed if it did."""

    timestamp: datetime
    event: str
    event_details: dict[str, Any] = Field(default_factory=dict)
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLogResponse(ResponseModel):
    """Oldest first."""

    entries: list[AuditLogEntry]


# ---- usage -----------------------------------------------------------------------------------------------------------


class GetBillingUsageRequest(RequestModel):
    """From `starting_on` until before `ending_before`; both with a time zone."""

    starting_on: AwareDatetime
    ending_before: AwareDatetime

    @model_validator(mode="after")
    def _in_order(self) -> GetBillingUsageRequest:
        if self.ending_before <= self.starting_on:
            raise ValueError(f"ending_before: expected a time after starting_on ({self.starting_on.isoformat()})")
        return self


class TrainingBillingEvent(ResponseModel):
    type: Literal["training"] = "training"
    token_count: int


class SamplingPrefillBillingEvent(ResponseModel):
    """`cached`: the prompt's tokens had been read before."""

    type: Literal["sampling_prefill"] = "sampling_prefill"
    cached: bool
    token_count: int


class SamplingSampleBillingEvent(ResponseModel):
    type: Literal["sampling_sample"] = "sampling_sample"
    token_count: int


class CheckpointBillingEvent(ResponseModel):
    type: Literal["checkpoint"] = "checkpoint"
    count: int


class StorageBillingEvent(ResponseModel):
    type: Literal["storage"] = "storage"
    free: bool = False
    gigabyte_hours: float


BillingEventInfo: TypeAlias = Annotated[
    TrainingBillingEvent
    | SamplingPrefillBillingEvent
    | SamplingSampleBillingEvent
    | CheckpointBillingEvent
    | StorageBillingEvent,
    Field(discriminator="type"),
]


class BillingUsageEvent(ResponseModel):
    """What was used in one hour; `event_info` says of what kind it was. Rates and costs are None where none apply."""

    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None = None
    user_id: str | None = None
    user_name: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None
    event_info: BillingEventInfo


class BillingUsageSession(ResponseModel):
    user_metadata: dict[str, str] | None = None


class BillingUsageResponse(ResponseModel):
    """`sessions`: by id, those that appear in `data`. mint-engine bills nobody, so its own answer is empty."""

    data: list[BillingUsageEvent]
    sessions: dict[str, BillingUsageSession] = Field(default_factory=dict)
    cost_data_through: datetime | None = None


# ---- storage ---------------------------------------------------------------------------------------------------------


class CurrentCheckpointStorageUsageItem(ResponseModel):
    """The checkpoints of one project; `project_id` is None for those of none. A gigabyte is 10^9 bytes."""

    project_id: str | None = None
    org_user_urn: str | None = None
    user_email: str | None = None
    user_name: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None = None


class CurrentCheckpointStorageUsageResponse(ResponseModel):
    """mint-engine's storage costs nothing: rate and costs are None there."""

    effective_rate_usd_per_gigabyte_month: float | None = None
    data: list[CurrentCheckpointStorageUsageItem]
