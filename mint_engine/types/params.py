"""What a caller chooses: the adapter, the optimiser step, how to sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, field_validator, model_validator

from mint_engine.types.base import RequestModel

LORA_ALPHA = 32
"""PEFT's lora_alpha of every adapter, whatever its rank ("LoRA Without Regret": the best learning rate stays put)."""

MAX_RANK = 256

MAX_STOPS = 64
MAX_STOP_LENGTH = 256
"""The end of every sample is compared with all stop strings at every token, beside everybody else's samples."""

LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
OptimizerType: TypeAlias = Literal["adamw"]


class LoraConfig(RequestModel):
    """The adapter: `rank` 1..256, the seed of A's initial values, and which linears it adapts."""

    rank: int = Field(default=16, ge=1, le=MAX_RANK)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @model_validator(mode="after")
    def _something_to_train(self) -> LoraConfig:
        if not (self.train_attn or self.train_mlp or self.train_unembed):
            raise ValueError("expected train_attn, train_mlp or train_unembed to be True: nothing to train")
        return self

    @property
    def alpha(self) -> int:
        return LORA_ALPHA

    @property
    def scale(self) -> float:
        """alpha / rank, the factor of B A x."""
        return LORA_ALPHA / self.rank


class AdamOptimizerConfig(RequestModel):
    """The optimiser of a model. There is one: Adam with decoupled weight decay."""

    type: OptimizerType = "adamw"


_SMALLEST = 2.0**-126  # float32's smallest normal number: a smaller eps may be 0 where it is used, and the step 0 / 0


class AdamParams(RequestModel):
    """Hyperparameters of one AdamW step (decoupled weight decay, bias correction).

    `betas=(b1, b2)` may be given instead of `beta1`, `beta2`.
    `grad_clip_norm`: the largest global gradient norm, 0 = no clipping.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    learning_rate: float = Field(default=5e-5, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, ge=_SMALLEST)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip_norm: float = Field(default=0.0, ge=0)

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            learning_rate: float = 5e-5,
            betas: Sequence[float] | None = None,
            beta1: float = 0.9,
            beta2: float = 0.999,
            eps: float = 1e-8,
            weight_decay: float = 0.0,
            grad_clip_norm: float = 0.0,
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _split_betas(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "betas" not in values:
            return values
        if "beta1" in values or "beta2" in values:
            raise ValueError("betas: expected either betas or beta1/beta2, got both")
        fields = dict(values)
        betas = fields.pop("betas")
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas: expected a pair (beta1, beta2), got {betas!r}")
        return fields | {"beta1": betas[0], "beta2": betas[1]}

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, self.beta2


OptimParams: TypeAlias = AdamParams


class SamplingParams(RequestModel):
    """How to sample.

    max_tokens: most tokens to generate; None = up to the model's context.
    seed: fixes the random numbers of every sample; None = fresh ones. The same request then gives the same tokens,
        except that in bfloat16 other requests decoded beside it change roundings, which may tip a draw.
    stop: string(s) or token id(s) that end a sample and are part of it; None = the model's end-of-sequence tokens;
        [] = nothing stops it. At most 64 strings of at most 256 characters.
    stop_token_ids: token ids added to `stop`.
    temperature: 0 = greedy. top_k: -1 = off. top_p: 1 = off.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str | int] | None = None
    temperature: float = Field(default=1.0, ge=0)
    top_k: int = -1
    top_p: float = Field(default=1.0, gt=0, le=1)

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            max_tokens: int | None = None,
            seed: int | None = None,
            stop: str | Sequence[str] | Sequence[int] | None = None,
            temperature: float = 1.0,
            top_k: int = -1,
            top_p: float = 1.0,
            stop_token_ids: Sequence[int] | None = None,
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _merge_stop(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = dict(values)
        token_ids = _listed(fields.pop("stop_token_ids", None))
        stop = fields.get("stop")
        if token_ids:
            stop = [*([stop] if isinstance(stop, (str, int)) else _listed(stop) or []), *token_ids]
        elif not isinstance(stop, str):
            stop = [stop] if isinstance(stop, int) else _listed(stop)
        return fields | {"stop": stop}

    @field_validator("stop", mode="after")
    @classmethod
    def _stop_can_match(cls, stop: str | list[str | int] | None) -> str | list[str | int] | None:
        for item in [stop] if isinstance(stop, str) else stop or []:
            if item == "" or (isinstance(item, int) and item < 0):
                raise ValueError(f"stop: expected non-empty strings or token ids of at least 0, got {item!r}")
        strings = [item for item in ([stop] if isinstance(stop, str) else stop or []) if isinstance(item, str)]
        if len(strings) > MAX_STOPS or any(len(item) > MAX_STOP_LENGTH for item in strings):
            raise ValueError(f"stop: expected at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
        return stop

    @field_validator("top_k", mode="after")
    @classmethod
    def _top_k_counts(cls, top_k: int) -> int:
        if top_k != -1 and top_k < 1:
            raise ValueError(f"top_k: expected -1 (off) or at least 1, got {top_k}")
        return top_k

    @property
    def stop_strings(self) -> list[str]:
        """The strings of `stop`."""
        items = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [item for item in items if isinstance(item, str)]

    @property
    def stop_token_ids(self) -> list[int]:
        """The token ids of `stop`."""
        return [] if isinstance(self.stop, str) else [item for item in self.stop or [] if isinstance(item, int)]

    @property
    def stops_at_eos(self) -> bool:
        """True when no `stop` was given, so that the model's end-of-sequence tokens end a sample."""
        return self.stop is None


def _listed(value: Any) -> Any:
    """Tuples, arrays and tensors as plain lists; pydantic judges the rest."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, (tuple, set, range)) else value
