"""The request of `forward` and `forward_backward`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mint_engine.errors import UserError
from mint_engine.types import Datum, TensorData
from mint_engine.types.datum import LOSS_INPUT_DTYPES, as_tensor_data
from mint_engine.wire import messages
from mint_engine.wire.errors import WireError, show
from mint_engine.wire.json_values import name_from_json, seq_id_from_json, tensor_from_json, tokens_from_json
from mint_engine.wire.tensors import DenseBudget, numbers, parse_tensor, raw, write_tensor

_INT32 = np.dtype("<i4")

# Losses of newer SDKs that this engine will not have, and what to do instead.
_NOT_HERE = {
    "custom": "server-side custom losses are not supported here: give forward_backward_custom a Python function",
    "stable_reinforce": "'stable_reinforce' is not supported here: use importance_sampling, ppo or cispo",
}


@dataclass(frozen=True)
class ForwardBackwardRequest:
    """One call, or one chunk of one. `seq_id` None = after everything accepted so far."""

    model_id: str
    seq_id: int | None
    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float] = field(default_factory=dict)
    forward_only: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that the model will read."""
        return sum(datum.num_tokens for datum in self.data)


def parse_forward_backward(body: bytes) -> ForwardBackwardRequest:
    """The protobuf request of tinker 0.22 and 0.38. Raises WireError, or UserError for what is not supported here."""
    message = messages.parse(messages.ForwardBackwardRequest, body)
    _check_loss(message.loss_fn)
    config: dict[str, float] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise UserError(f"loss_fn_config: expected a number for {show(key)}, got {show(value.text)}")
        config[key] = value.number
    for key in config:
        name_from_json(key, "loss_fn_config")
    budget = DenseBudget()
    return ForwardBackwardRequest(
        model_id=name_from_json(message.model_id, "model_id"),
        seq_id=seq_id_from_json(message.seq_id or None),  # 0 is how proto3 says that there is none
        data=[_parse_datum(datum, f"(datum {i})", budget) for i, datum in enumerate(message.data)],
        loss_fn=name_from_json(message.loss_fn, "loss_fn"),
        loss_fn_config=config,
        forward_only=message.forward_only,
    )


def forward_backward_from_json(obj: Mapping[str, Any], *, forward_only: bool = False) -> ForwardBackwardRequest:
    """The JSON request of tinker 0.22: of `forward` (`forward_input`) or `forward_backward`. Raises as above."""
    key = "forward_input" if forward_only else "forward_backward_input"
    given = obj.get(key)
    if not isinstance(given, Mapping):
        raise WireError(f"{key}: expected an object, got {show(given)}")
    data, config = given.get("data"), given.get("loss_fn_config") or {}
    if not isinstance(data, list):
        raise WireError(f"data: expected a list of datums, got {show(data)}")
    loss_fn = name_from_json(given.get("loss_fn"), "loss_fn")
    _check_loss(loss_fn)
    if not isinstance(config, Mapping):
        raise WireError(f"loss_fn_config: expected an object, got {show(config)}")
    for name, value in config.items():
        name_from_json(name, "loss_fn_config")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            raise UserError(f"loss_fn_config: expected a number for {show(name)}, got {show(value)}")
    budget = DenseBudget()
    return ForwardBackwardRequest(
        model_id=name_from_json(obj.get("model_id"), "model_id"),
        seq_id=seq_id_from_json(obj.get("seq_id")),
        data=[_datum_from_json(datum, f"(datum {i})", budget) for i, datum in enumerate(data)],
        loss_fn=loss_fn,
        loss_fn_config={name: float(value) for name, value in config.items()},
        forward_only=forward_only,
    )


def encode_forward_backward(request: ForwardBackwardRequest) -> bytes:
    """The protobuf request, for a client. Raises UserError for token ids that are none."""
    message = messages.ForwardBackwardRequest(
        model_id=request.model_id,
        seq_id=request.seq_id or 0,
        loss_fn=request.loss_fn,
        forward_only=request.forward_only,
    )
    for key, value in request.loss_fn_config.items():
        message.loss_fn_config[key] = value  # servers before v2 read this one
        message.loss_fn_config_v2[key].number = value
    for i, datum in enumerate(request.data):
        entry = message.data.add()
        entry.model_input.add().encoded_text.tokens = raw(_int32(datum, i))
        for name, tensor in datum.loss_fn_inputs.items():
            write_tensor(entry.loss_fn_inputs[name], tensor)
    body: bytes = message.SerializeToString()
    return body


def address(request: bytes | Mapping[str, Any]) -> tuple[str, int | None] | None:
    """`model_id` and `seq_id` of a request that was refused (its number is used up), or None if it does not say.

    Args:
        request: the protobuf body, or the parsed JSON, of any request about a model.
    """
    try:
        if isinstance(request, Mapping):
            return name_from_json(request.get("model_id"), "model_id"), seq_id_from_json(request.get("seq_id"))
        message = messages.parse(messages.ForwardBackwardRequest, request)
        return name_from_json(message.model_id, "model_id"), seq_id_from_json(message.seq_id or None)
    except UserError:
        return None


_SCALAR = rb'(?:"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null)'
_LAST_MEMBERS = re.compile(rb'[{,]((?:\s*"\w+"\s*:\s*%b\s*,)*\s*"\w+"\s*:\s*%b\s*\})\s*\Z' % (_SCALAR, _SCALAR))


def last_members(end: bytes) -> Mapping[str, Any]:
    """The last members of a JSON object of which only the ``end`` is there: those behind all arrays and objects."""
    found = _LAST_MEMBERS.search(end)
    try:
        members: Mapping[str, Any] = json.loads(b"{" + found[1]) if found else {}
    except ValueError:
        return {}
    return members


def _check_loss(loss_fn: str) -> None:
    if loss_fn in _NOT_HERE:
        raise UserError(f"loss_fn: {_NOT_HERE[loss_fn]}")


def _parse_datum(message: Any, at: str, budget: DenseBudget) -> Datum:
    chunks = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UserError(
                f"model_input: expected encoded_text chunks, got {kind or 'an empty one'}: "
                f"image and audio inputs are not supported here {at}"
            )
        chunks.append(chunk.encoded_text.tokens)
    tokens = numbers(chunks[0] if len(chunks) == 1 else b"".join(chunks), _INT32, f"model_input {at}")
    inputs = {
        name_from_json(name, "loss_fn_inputs"): _as_loss_input(name, parse_tensor(tensor, f"{name} {at}", budget), at)
        for name, tensor in message.loss_fn_inputs.items()
    }
    return Datum.of_arrays(tokens, inputs)


def _datum_from_json(obj: Any, at: str, budget: DenseBudget) -> Datum:
    if not isinstance(obj, Mapping):
        raise WireError(f"data: expected an object, got {show(obj)} {at}")
    given = obj.get("loss_fn_inputs") or {}
    if not isinstance(given, Mapping):
        raise WireError(f"loss_fn_inputs: expected an object, got {show(given)} {at}")
    tokens = tokens_from_json(obj.get("model_input"), f"model_input {at}")
    inputs = {
        name_from_json(name, "loss_fn_inputs"): _as_loss_input(
            name, tensor_from_json(value, f"{name} {at}", budget), at
        )
        for name, value in given.items()
    }
    return Datum.of_arrays(tokens, inputs)


def _as_loss_input(name: str, tensor: TensorData, at: str) -> TensorData:
    """With the dtype that the losses want: weights may come as integers."""
    if LOSS_INPUT_DTYPES.get(name, tensor.dtype) == tensor.dtype:
        return tensor
    try:
        return as_tensor_data(name, tensor)
    except UserError as error:
        raise WireError(f"{error} {at}") from None


def _int32(datum: Datum, index: int) -> np.ndarray:
    try:
        tokens = datum.token_array()
    except OverflowError:
        tokens = np.array([-1])
    if tokens.size and (tokens.min() < 0 or tokens.max() >= 2**31):
        raise UserError(f"model_input: expected token ids in [0, 2^31) (datum {index})")
    return tokens.astype(_INT32)
