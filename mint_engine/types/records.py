"""What is stored: sessions, training runs, samplers, checkpoints, and the names of checkpoints."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, TypeAlias

from pydantic import Field

from mint_engine.errors import UserError
from mint_engine.types.base import ResponseModel
from mint_engine.types.params import AdamOptimizerConfig

ModelID: TypeAlias = str
CheckpointType: TypeAlias = Literal["training", "sampler", "external"]
CheckpointKind: TypeAlias = Literal["weights", "sampler_weights", "external_weights"]
AccessScope: TypeAlias = Literal["owned", "accessible"]

_TYPE_OF_KIND: dict[CheckpointKind, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


class Cursor(ResponseModel):
    offset: int
    limit: int
    total_count: int


class Checkpoint(ResponseModel):
    """A saved version of an adapter: for training (with the optimiser's state), for sampling, or to be downloaded."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


class ParsedCheckpointTinkerPath(ResponseModel):
    """The parts of `tinker://<run>/<kind>/<name>`; kind is `weights`, `sampler_weights` or `external_weights`."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Parse a path; `mint://` is an alias of `tinker://`, and the scheme may be left out. Raises UserError."""
        if not isinstance(tinker_path, str):
            raise UserError(f"path: expected a string tinker://<run>/weights/<name>, got {type(tinker_path).__name__}")
        bare = strip_scheme(tinker_path)
        parts = bare.split("/")
        kind = next((k for k in _TYPE_OF_KIND if len(parts) == 3 and parts[1] == k), None)
        if kind is None or not all(parts):
            raise UserError(
                f"path: expected tinker://<run>/<kind>/<name> with kind one of {', '.join(_TYPE_OF_KIND)}, "
                f"got {tinker_path!r}"
            )
        return cls(
            tinker_path=f"tinker://{bare}",
            training_run_id=parts[0],
            checkpoint_type=_TYPE_OF_KIND[kind],
            checkpoint_id=f"{kind}/{parts[2]}",
        )

    @property
    def kind(self) -> CheckpointKind:
        return next(kind for kind, of in _TYPE_OF_KIND.items() if of == self.checkpoint_type)

    @property
    def name(self) -> str:
        return self.checkpoint_id.split("/", 1)[1]


def strip_scheme(path: str) -> str:
    """`path` without a leading `tinker://` or `mint://`."""
    return path.removeprefix("tinker://").removeprefix("mint://")


class CheckpointsListResponse(ResponseModel):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class CheckpointArchiveUrlResponse(ResponseModel):
    """`url` of a tar.gz of the adapter, and when it stops being valid."""

    url: str
    expires: datetime


class ExternalWeightsUrlsResponse(ResponseModel):
    """One URL for each file of a checkpoint, and when they stop being valid."""

    urls: dict[str, str]
    expires: datetime


class WeightsInfoResponse(ResponseModel):
    """What is needed to build a model that a checkpoint fits."""

    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: AdamOptimizerConfig = Field(default_factory=AdamOptimizerConfig)


class TrainingRun(ResponseModel):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class TrainingRunsResponse(ResponseModel):
    training_runs: list[TrainingRun]
    cursor: Cursor


class SupportedModel(ResponseModel):
    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class GetServerCapabilitiesResponse(ResponseModel):
    supported_models: list[SupportedModel]


class GetSamplerResponse(ResponseModel):
    sampler_id: str
    base_model: str
    model_path: str | None = None


class GetSessionResponse(ResponseModel):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class ListSessionsResponse(ResponseModel):
    sessions: list[str]
