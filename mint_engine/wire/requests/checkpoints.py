"""Saving, loading, copying and keeping weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mint_engine.wire.requests.base import Count, Metadata, Name, Seconds, SeqId, WireRequest
from mint_engine.wire.requests.training import OptimizerChoice


class SaveWeightsRequest(WireRequest):
    """`POST save_weights`. `path` is the checkpoint's name."""

    model_id: Name
    path: Name | None = None
    seq_id: SeqId | None = None
    ttl_seconds: Seconds | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveWeightsForSamplerRequest(WireRequest):
    """`POST save_weights_for_sampler`: a checkpoint named `path`, or a sampler that is not saved anywhere.

    `overwrite` is ours: an SDK cannot save twice under one name.
    """

    model_id: Name
    path: Name | None = None
    overwrite: bool = False
    sampling_session_seq_id: Count | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: SeqId | None = None
    ttl_seconds: Seconds | None = None
    user_metadata: Metadata | None = None

    @model_validator(mode="after")
    def _named_or_numbered(self) -> SaveWeightsForSamplerRequest:
        if self.path is None and self.sampling_session_seq_id is None:
            raise ValueError("path: expected path or sampling_session_seq_id, got neither")
        return self


class SaveWeightsExternalRequest(WireRequest):
    """`POST save_weights_external`: a PEFT directory, encrypted if there are age recipients."""

    model_id: Name
    path: Name
    seq_id: SeqId | None = None
    ttl_seconds: Seconds | None = None
    age_encryption_recipients: list[Annotated[str, Field(max_length=512)]] | None = Field(default=None, max_length=64)


class LoadWeightsRequest(WireRequest):
    """`POST load_weights`: into the model `model_id`, or as a new model of `session_id` (`creates_model`)."""

    model_id: Name | None = None
    seq_id: SeqId | None = None
    session_id: Name | None = None
    model_seq_id: Count | None = None
    base_model: Name | None = None
    user_metadata: Metadata | None = None
    path: Name
    optimizer: bool = False
    optimizer_config: OptimizerChoice = Field(default_factory=OptimizerChoice)
    weights_access_token: str | None = None

    @model_validator(mode="after")
    def _one_address(self) -> LoadWeightsRequest:
        creates = self.session_id is not None and self.model_seq_id is not None
        if creates == (self.model_id is not None):
            raise ValueError("model_id: expected either model_id, or session_id and model_seq_id")
        return self

    @property
    def creates_model(self) -> bool:
        return self.model_id is None


class WeightsInfoRequest(WireRequest):
    """`POST weights_info`."""

    tinker_path: Name


class CopyWeightsRequest(WireRequest):
    """`POST copy_weights`."""

    source_path: Name
    session_id: Name | None = None
    model_seq_id: Count | None = None
    destination_project_id: Name | None = None
    ttl_seconds: Seconds | None = None
    weights_access_token: str | None = None


class SetTtlRequest(WireRequest):
    """`PUT training_runs/{run}/checkpoints/{id}/ttl`; null = keep for ever."""

    ttl_seconds: Seconds | None = None
