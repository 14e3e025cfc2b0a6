"""What mindlab-toolkit adds to the protocol."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mint_engine.errors import UserError
from mint_engine.types import ReverseKLDatum
from mint_engine.wire.requests.base import Name, SeqId, WireRequest
from mint_engine.wire.requests.inputs import JsonDenseTensor, JsonModelInput


class InterpolateCheckpointsRequest(WireRequest):
    """`POST mint/checkpoints/interpolate`."""

    source_paths: list[Name] = Field(min_length=1, max_length=64)
    coefficients: list[float] = Field(min_length=1, max_length=64)
    output_path: Name | None = None
    output_checkpoint_type: Literal["sampler"] = "sampler"

    @model_validator(mode="after")
    def _one_coefficient_each(self) -> InterpolateCheckpointsRequest:
        if len(self.source_paths) != len(self.coefficients):
            raise ValueError(
                f"coefficients: expected {len(self.source_paths)}, one for each of source_paths, "
                f"got {len(self.coefficients)}"
            )
        return self


class ReverseKLDatumRequest(WireRequest):
    """The same completion under two prompts."""

    student_input: JsonModelInput
    reference_input: JsonModelInput
    target_tokens: JsonDenseTensor
    weights: JsonDenseTensor


class ReverseKLRequest(WireRequest):
    """`POST mint/forward_backward_reverse_kl`. `seq_id` null = after everything accepted so far."""

    model_id: Name
    reference_model_path: Name
    data: list[ReverseKLDatumRequest] = Field(min_length=1)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    seq_id: SeqId | None = None

    def datums(self) -> list[ReverseKLDatum]:
        """Raises UserError for tensors of the wrong kind, and says which datum."""
        datums = []
        for i, d in enumerate(self.data):
            try:
                datums.append(ReverseKLDatum(d.student_input, d.reference_input, d.target_tokens, d.weights))
            except UserError as error:
                raise UserError(f"{error} (datum {i})") from None
        return datums
