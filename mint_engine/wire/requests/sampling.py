"""Samplers and samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mint_engine.types import SamplingParams
from mint_engine.wire.requests.base import Count, Name, WireRequest, checked
from mint_engine.wire.requests.inputs import JsonModelInput, JsonTensor


class CreateSamplingSessionRequest(WireRequest):
    """`POST create_sampling_session`: of a base model, or of a checkpoint's path."""

    session_id: Name
    sampling_session_seq_id: Count
    base_model: Name | None = None
    model_path: Name | None = None

    @model_validator(mode="after")
    def _of_something(self) -> CreateSamplingSessionRequest:
        if self.base_model is None and self.model_path is None:
            raise ValueError("base_model: expected base_model or model_path, got neither")
        return self


class JoinSamplingSessionRequest(WireRequest):
    """`POST join_sampling_session`."""

    sampling_session_id: Name


class WireSamplingParams(WireRequest):
    """How to sample; `stop` is a string, strings or token ids."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[int | str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SampleRequest(WireRequest):
    """`POST asample`: of a sampler, or (which no SDK does) of a base model or a path."""

    sampling_session_id: Name | None = None
    base_model: Name | None = None
    model_path: Name | None = None
    seq_id: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    num_samples: int = Field(default=1, ge=0, le=256)  # 0 only scores the prompt
    prompt: JsonModelInput
    params: WireSamplingParams = Field(default_factory=WireSamplingParams, alias="sampling_params")
    prompt_logprobs: bool = False
    topk_prompt_logprobs: Count = 0
    topk_sample_logprobs: Count = 0
    target_prompt_logprobs: JsonTensor | None = None
    prompt_alt_tokens_k: Count = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool = False

    def sampling_params(self) -> SamplingParams:
        """Raises UserError for values out of range."""
        return checked(SamplingParams, self.params.model_dump(), "sampling_params")


class FuturesTarget(WireRequest):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Name
    cloned_sampler_id: Count = 0


class RetrieveFutureRequest(WireRequest):
    """`POST retrieve_future`."""

    request_id: Name
    allow_metadata_only: bool = False


class RetrieveFuturesRequest(WireRequest):
    """`POST retrieve_futures`: which samples of a sampler have ended. `timeout` 0 only acknowledges."""

    target: FuturesTarget
    prev_cursor: Count = 0
    timeout: Annotated[float, Field(ge=0)] | None = None
    retrieved_request_ids: list[Name] = Field(default_factory=list)


class CancelFutureRequest(WireRequest):
    """`POST cancel_future`."""

    request_id: Name
