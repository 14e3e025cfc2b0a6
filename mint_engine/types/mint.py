"""MinT's two calls beside the SDK's: reverse KL to a reference model, and sums of checkpoints (wire-protocol 3.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mint_engine.errors import UserError
from mint_engine.types.base import ResponseModel
from mint_engine.types.datum import as_tensor_data
from mint_engine.types.model_input import ModelInput
from mint_engine.types.results import LossFnOutput
from mint_engine.types.tensor_data import TensorData


@dataclass(frozen=True)
class ReverseKLDatum:
    """One completion under two prompts.

    Args:
        student_input, reference_input: what either model reads. The last ``len(target_tokens)`` positions of both
            predict the same completion, as in a `Datum`.
        target_tokens: the completion, int64 [T]. The loss compares whole distributions, so only its length counts.
        weights: float32 [T], of any sign; a position of weight 0 costs nothing.

    Raises:
        UserError (a ValueError): a value that is no tensor of numbers. Lengths are checked when the datum is used.
    """

    student_input: ModelInput
    reference_input: ModelInput
    target_tokens: TensorData
    weights: TensorData

    def __post_init__(self) -> None:
        for name in ("student_input", "reference_input"):
            value: Any = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, ModelInput.model_validate(value))
            elif not isinstance(value, ModelInput):
                raise UserError(f"{name}: expected a ModelInput, got {type(value).__name__}")
        for name in ("target_tokens", "weights"):
            object.__setattr__(self, name, as_tensor_data(name, getattr(self, name)))


class ReverseKLItemOutput(dict[str, TensorData]):
    """``{"loss": float32 [1]}`` of one datum, which mindlab-toolkit reads as ``.loss``."""

    @property
    def loss(self) -> TensorData:
        return self["loss"]


@dataclass(frozen=True)
class ReverseKLOutput:
    """``outputs``: per datum its weighted sum of KL. ``metrics``: ``loss:sum`` is their sum,
    ``kl:mean`` the unweighted mean over the positions with a weight, ``tokens:sum`` their number."""

    outputs: Sequence[ReverseKLItemOutput]
    metrics: dict[str, float] = field(default_factory=dict)
    type: Literal["mint_forward_backward_reverse_kl"] = "mint_forward_backward_reverse_kl"

    if TYPE_CHECKING:

        def __init__(self, outputs: Sequence[LossFnOutput], metrics: dict[str, float] = ...) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "outputs", [ReverseKLItemOutput(output) for output in self.outputs])

    @property
    def loss(self) -> float:
        return self.metrics["loss:sum"]


class InterpolateCheckpointsResponse(ResponseModel):
    """``path``: of the new sampler checkpoint."""

    path: str
    checkpoint_type: Literal["sampler"] = "sampler"
    source_paths: list[str]
    coefficients: list[float]
    has_rank_shards: bool = False
    type: Literal["mint_interpolate_checkpoints"] = "mint_interpolate_checkpoints"
