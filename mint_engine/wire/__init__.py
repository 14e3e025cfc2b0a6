"""The wire format: what travels between a client and a server, as protobuf and as JSON.

Both ends use it: `mint_engine.server` and our own HTTP client. The messages are those of the tinker SDKs 0.22 and 0.38
(`messages.proto`); the values are our own types (`mint_engine.types`). JSON request bodies are in `wire.requests`.

Everything that parses takes hostile input: it raises `WireError` or `UserError` and nothing else, and needs memory in
proportion to what it was given.
"""

from mint_engine.wire.bodies import compress_body, decode_body, parse_json
from mint_engine.wire.errors import BodyTooLargeError, EncodingError, WireError, explain
from mint_engine.wire.forward_backward import (
    ForwardBackwardRequest,
    address,
    encode_forward_backward,
    forward_backward_from_json,
    last_members,
    parse_forward_backward,
)
from mint_engine.wire.outputs import (
    encode_forward_backward_output,
    forward_backward_output_to_json,
    has_one_layout,
    parse_forward_backward_output,
)
from mint_engine.wire.samples import encode_sample_response, parse_sample_response, sample_response_to_json

PROTOBUF = "application/x-protobuf"
"""The content type of a protobuf body, and what `Accept` must contain to get one."""

__all__ = [
    "PROTOBUF",
    "BodyTooLargeError",
    "EncodingError",
    "ForwardBackwardRequest",
    "WireError",
    "address",
    "compress_body",
    "decode_body",
    "encode_forward_backward",
    "encode_forward_backward_output",
    "encode_sample_response",
    "explain",
    "forward_backward_from_json",
    "forward_backward_output_to_json",
    "has_one_layout",
    "last_members",
    "parse_forward_backward",
    "parse_forward_backward_output",
    "parse_json",
    "parse_sample_response",
    "sample_response_to_json",
]
