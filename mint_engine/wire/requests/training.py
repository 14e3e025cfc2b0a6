"""Models and their optimiser. (forward and forward_backward are in `wire.forward_backward`.)"""

from __future__ import annotations

from pydantic import AliasChoices, Field, model_validator

from mint_engine.types import AdamParams, LoraConfig
from mint_engine.wire.errors import show
from mint_engine.wire.requests.base import Count, Metadata, Name, SeqId, WireRequest, checked
from mint_engine.wire.requests.inputs import JsonModelInput, JsonTensor


class OptimizerChoice(WireRequest):
    """The optimiser of a model."""

    type: str = "adamw"

    @model_validator(mode="after")
    def _is_adam(self) -> OptimizerChoice:
        _only_adam("optimizer_config", self.type)
        return self


class WireLoraConfig(WireRequest):
    """The adapter to make. Where a client says nothing, the SDKs' default rank counts."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModelRequest(WireRequest):
    """`POST create_model`; the model's id is `f"{session_id}:train:{model_seq_id}"`."""

    session_id: Name
    model_seq_id: Count
    base_model: Name
    user_metadata: Metadata | None = None
    lora_config: WireLoraConfig = Field(default_factory=WireLoraConfig)
    optimizer_config: OptimizerChoice = Field(default_factory=OptimizerChoice)

    def to_lora_config(self) -> LoraConfig:
        """Raises UserError for a rank out of range, or nothing to train."""
        return checked(LoraConfig, self.lora_config.model_dump(), "lora_config")


class GetInfoRequest(WireRequest):
    """`POST get_info`."""

    model_id: Name


class UnloadModelRequest(WireRequest):
    """`POST unload_model` of tinker 0.22."""

    model_id: Name


class WireOptimParams(WireRequest):
    """A step. Where a client says nothing, the SDKs' defaults count, not those of our own `AdamParams`."""

    type: str = "adamw"
    learning_rate: float = 1e-4
    beta1: float | None = None
    beta2: float | None = None
    betas: list[float] | None = None
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    @model_validator(mode="after")
    def _is_adam(self) -> WireOptimParams:
        _only_adam("optimizer_params", self.type)
        return self


class OptimStepRequest(WireRequest):
    """`POST optim_step`."""

    model_id: Name
    seq_id: SeqId | None = None
    params: WireOptimParams = Field(
        default_factory=WireOptimParams,
        validation_alias=AliasChoices("adam_params", "optimizer_params", "optim_params"),
        serialization_alias="adam_params",
    )

    def adam_params(self) -> AdamParams:
        """Raises UserError for values out of range."""
        values = self.params.model_dump(exclude={"type"}, exclude_none=True)
        if "betas" not in values:
            values = {"beta1": 0.9, "beta2": 0.95} | values
        return checked(AdamParams, values, "adam_params")


class CreateCustomLossRequest(WireRequest):
    """`POST create_custom_loss`: known by name, so that it can be refused by name."""

    session_id: Name


def _only_adam(name: str, kind: str) -> None:
    if kind != "adamw":
        raise ValueError(f"{name}: expected the optimizer 'adamw', got {show(kind)}, which is not supported here")


class DatumBody(WireRequest):
    """One example."""

    model_input: JsonModelInput
    loss_fn_inputs: dict[str, JsonTensor] = Field(default_factory=dict)


class LossBody(WireRequest):
    """The examples of a call, and their loss."""

    data: list[DatumBody]
    loss_fn: Name
    loss_fn_config: dict[str, float] | None = None


class ForwardBody(WireRequest):
    """`POST forward`. This and the next say what the JSON looks like; `wire.forward_backward_from_json` reads it."""

    model_id: Name
    seq_id: SeqId | None = None
    forward_input: LossBody


class ForwardBackwardBody(WireRequest):
    """`POST forward_backward` as JSON; SDKs send protobuf."""

    model_id: Name
    seq_id: SeqId | None = None
    forward_backward_input: LossBody
