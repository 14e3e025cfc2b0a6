"""What training and sampling calls answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from pydantic import Field

from mint_engine.types.base import ResponseModel
from mint_engine.types.params import AdamOptimizerConfig
from mint_engine.types.tensor_data import TensorData

LossFnOutput: TypeAlias = dict[str, TensorData]
StopReason: TypeAlias = Literal["length", "stop"]
TopkLists: TypeAlias = list[list[tuple[int, float]] | None]

NO_LOGPROB = -99999.0
"""The log-probability of a cell of `TopkLogprobs` that holds nothing."""


@dataclass(frozen=True, slots=True)
class TopkLogprobs:
    """The k most likely tokens of each position as matrices [positions, k]: int32 ids and float32 log-probabilities.
    A cell that holds nothing has id 0 and log-probability -99999."""

    token_ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def of(cls, rows: TopkLists) -> TopkLogprobs:
        k = max((len(row) for row in rows if row is not None), default=0)
        ids = np.zeros((len(rows), k), np.int32)
        logprobs = np.full((len(rows), k), NO_LOGPROB, np.float32)
        for i, row in enumerate(rows):
            if row:
                ids[i, : len(row)], logprobs[i, : len(row)] = zip(*row, strict=True)
        return cls(ids, logprobs)


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """Result of `forward` and `forward_backward`.

    loss_fn_outputs: one dict per datum, in order; `["logprobs"]` is float32 with the shape of target_tokens.
    metrics: floats by name, each name ending in its reduction; `loss:sum` is the loss summed over tokens and datums.
    weight_sum: sum of the weights, for cross_entropy; None for the other losses.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)
    weight_sum: float | None = field(default=None, repr=False)

    @property
    def loss(self) -> float:
        """For cross_entropy the weighted mean sum(-logprob * weight) / sum(weight), 0.0 where the weights sum to 0;
        for every other loss the sum. The gradient is that of the sum in all cases."""
        total = self.metrics["loss:sum"]
        if self.weight_sum is None:
            return total
        return total / self.weight_sum if self.weight_sum != 0 else 0.0


ForwardBackwardResult = ForwardBackwardOutput


class OptimStepResponse(ResponseModel):
    """`metrics`: for example `grad_norm`, the global norm before clipping."""

    metrics: dict[str, float] | None = None
    type: Literal["optim_step"] = "optim_step"


class SaveWeightsResponse(ResponseModel):
    path: str
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsExternalResponse(ResponseModel):
    path: str
    type: Literal["save_weights_external"] = "save_weights_external"


class LoadWeightsResponse(ResponseModel):
    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] = "load_weights"


class SaveWeightsForSamplerResponse(ResponseModel):
    """`path`: of the saved checkpoint, if it was named. `sampling_session_id`: a sampler of this very version."""

    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


@dataclass(frozen=True)
class SampledSequence:
    """One sample. `tokens` include the token(s) that ended it; `logprobs` are those under the tempered distribution."""

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float] | None = None
    topk_logprobs: TopkLists | None = None
    sequence_id: str = ""

    @property
    def tokens_np(self) -> np.ndarray:
        """int32, shape (tokens,)."""
        return np.asarray(self.tokens, dtype=np.int32)

    @property
    def logprobs_np(self) -> np.ndarray | None:
        """float32, shape (tokens,), or None."""
        return None if self.logprobs is None else np.asarray(self.logprobs, dtype=np.float32)

    @property
    def topk_logprobs_np(self) -> TopkLogprobs | None:
        return None if self.topk_logprobs is None else TopkLogprobs.of(self.topk_logprobs)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token as it is drawn. `sample`: which of the call's samples it continues; `logprob`: tempered."""

    sample: int
    token: int
    logprob: float


@dataclass(frozen=True)
class PromptAltTokens:
    """Draws from the model at every prompt position but the first: int64 ids and float32 logprobs [prompt - 1, k]."""

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True)
class SampleResponse:
    """Result of `sample`. Prompt log-probabilities are at temperature 1; entry 0 and all not asked for are None."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopkLists | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = 0

    @property
    def prompt_logprobs_np(self) -> np.ndarray | None:
        """float32, shape (len(prompt),), NaN where there is none."""
        if self.prompt_logprobs is None:
            return None
        return np.asarray([np.nan if p is None else p for p in self.prompt_logprobs], dtype=np.float32)

    @property
    def topk_prompt_logprobs_np(self) -> TopkLogprobs | None:
        return None if self.topk_prompt_logprobs is None else TopkLogprobs.of(self.topk_prompt_logprobs)


class ModelData(ResponseModel):
    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(ResponseModel):
    """A training client's model: the base model's name, the adapter's rank, where its tokenizer comes from."""

    model_id: str
    model_name: str | None = None
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_data: ModelData = Field(default_factory=ModelData)
    optimizer_config: AdamOptimizerConfig = Field(default_factory=AdamOptimizerConfig)
    type: Literal["get_info"] = "get_info"
