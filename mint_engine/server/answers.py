"""Results as bytes: protobuf where the kind has it and the client takes it, JSON otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response

from mint_engine import wire
from mint_engine.types import ForwardBackwardOutput, ReverseKLOutput, SampleResponse

if TYPE_CHECKING:
    from mint_engine.server.promises import Promise

JSON = "application/json"
PROTO_KINDS = frozenset({"Forward", "ForwardBackward", "Sample"})

# What a result takes in memory besides its numbers, and what a sampled token takes as Python objects.
_BASE_BYTES = 1024
TOKEN_BYTES = 100


@dataclass(frozen=True, slots=True)
class Encoded:
    body: bytes
    media_type: str


def is_uneven(value: Any) -> bool:
    """Whether tinker 0.22 could not read the protobuf of a result. It takes JSON, too."""
    return isinstance(value, ForwardBackwardOutput) and not wire.has_one_layout(value)


def media_type(kind: str, accept: str | None, *, uneven: bool = False) -> str:
    """The content type of a result for a client that sent ``Accept``."""
    accept = accept or ""
    if kind not in PROTO_KINDS or wire.PROTOBUF not in accept or (uneven and JSON in accept):
        return JSON
    return wire.PROTOBUF


def dumps(value: Any) -> bytes:
    """JSON without NaN or infinities: they become null. Keys of an object whose value is None are left out."""
    if isinstance(value, dict):
        value = {key: entry for key, entry in value.items() if entry is not None}
    return to_json(value, inf_nan_mode="null")


def promised(promise: Promise) -> Response:
    """What a POST answers at once."""
    return Response(dumps(promise.answer()), media_type=JSON)


def encode(value: Any, media: str) -> Encoded:
    match value:
        case ForwardBackwardOutput() if media == wire.PROTOBUF:
            return Encoded(wire.encode_forward_backward_output(value), media)
        case ForwardBackwardOutput():
            return Encoded(to_json(wire.forward_backward_output_to_json(value), inf_nan_mode="null"), JSON)
        case SampleResponse() if media == wire.PROTOBUF:
            return Encoded(wire.encode_sample_response(value), media)
        case SampleResponse():
            return Encoded(to_json(wire.sample_response_to_json(value), inf_nan_mode="null"), JSON)
        case ReverseKLOutput():
            outputs = [{name: tensor.to_dict() for name, tensor in output.items()} for output in value.outputs]
            return Encoded(dumps({"outputs": outputs, "metrics": value.metrics, "type": value.type}), JSON)
        case BaseModel():
            return Encoded(value.model_dump_json(exclude_none=True).encode(), JSON)
    return Encoded(dumps(value), JSON)


def decode(encoded: Encoded, kind: str) -> Any:
    """A result back from protobuf: its value was let go, and now JSON is asked for."""
    if kind == "Sample":
        return wire.parse_sample_response(encoded.body)
    return wire.parse_forward_backward_output(encoded.body)


def size(value: Any) -> int:
    """About how many bytes a result holds."""
    match value:
        case ForwardBackwardOutput():
            tensors = [tensor for output in value.loss_fn_outputs for tensor in output.values()]
            return _BASE_BYTES + sum(tensor.to_numpy().nbytes + 400 for tensor in tensors)
        case SampleResponse():
            tokens = sum(len(sequence.tokens) for sequence in value.sequences)
            rows = [value.topk_prompt_logprobs or [], *(s.topk_logprobs or [] for s in value.sequences)]
            alternatives = sum(len(row) for topk in rows for row in topk if row is not None)
            drawn, scored = value.prompt_alt_tokens, value.target_prompt_logprobs
            more = [] if scored is None else [scored]
            more += [] if drawn is None else [drawn.tokens, drawn.logprobs]
            nbytes = sum(tensor.to_numpy().nbytes for tensor in more)
            return _BASE_BYTES + nbytes + TOKEN_BYTES * (tokens + len(value.prompt_logprobs or ()) + alternatives)
    return _BASE_BYTES
