"""The result of `forward` and `forward_backward`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mint_engine.types import ForwardBackwardOutput, LossFnOutput, TensorData
from mint_engine.wire import messages
from mint_engine.wire.errors import WireError
from mint_engine.wire.json_values import finite
from mint_engine.wire.tensors import array_of, check_shape, dtype_number, numbers, raw

_OFFSET = np.dtype("<i8")
_MAX_DATUMS = 1 << 20


def encode_forward_backward_output(out: ForwardBackwardOutput) -> bytes:
    """Protobuf: per field one array of all datums, so that an SDK reads it without a copy per token."""
    message = messages.ForwardBackwardOutput(
        loss_fn_output_type=out.loss_fn_output_type, metrics=out.metrics, weight_sum=out.weight_sum
    )
    for _, group in itertools.groupby(out.loss_fn_outputs, key=_layout):
        _write_record(message.loss_fn_outputs.add(), list(group), out.loss_fn_output_type)
    body: bytes = message.SerializeToString()
    return body


def parse_forward_backward_output(body: bytes) -> ForwardBackwardOutput:
    """The other direction. Raises WireError. `weight_sum` travels too, in a field that the SDKs ignore."""
    message = messages.parse(messages.ForwardBackwardOutput, body)
    outputs: list[LossFnOutput] = []
    for record in message.loss_fn_outputs:
        outputs += _parse_record(record)
    return ForwardBackwardOutput(
        loss_fn_output_type=message.loss_fn_output_type,
        loss_fn_outputs=outputs,
        metrics=dict(message.metrics),
        weight_sum=message.weight_sum if message.HasField("weight_sum") else None,
    )


def forward_backward_output_to_json(out: ForwardBackwardOutput) -> dict[str, Any]:
    """JSON for tinker 0.22. What JSON cannot say (NaN, infinities) is null in tensors and left out of the metrics."""
    return {
        "loss_fn_output_type": out.loss_fn_output_type,
        "loss_fn_outputs": [
            {name: tensor_to_json(tensor) for name, tensor in datum.items()} for datum in out.loss_fn_outputs
        ],
        "metrics": {name: value for name, value in out.metrics.items() if math.isfinite(value)},
    }


def has_one_layout(out: ForwardBackwardOutput) -> bool:
    """Whether the datums differ in nothing but their lengths. tinker 0.22 cannot read the protobuf of others, such as
    datums with different numbers of targets per token: send JSON to whoever takes JSON."""
    return len(list(itertools.groupby(out.loss_fn_outputs, key=_layout))) <= 1


def tensor_to_json(tensor: TensorData) -> dict[str, Any]:
    """`TensorData.to_dict()` without NaN and infinities."""
    record = tensor.to_dict()
    if tensor.dtype == "float32":
        record["data"] = finite(record["data"])
    return record


def _layout(datum: LossFnOutput) -> list[tuple[str, str, list[int]]]:
    """What the datums of one record have in common."""
    return [(name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(datum.items())]


def _write_record(record: Any, datums: Sequence[LossFnOutput], type_tag: str) -> None:
    record.type_tag = type_tag
    record.num_datums = len(datums)
    for name, first in datums[0].items():
        field = record.fields[name]
        parts = [raw(datum[name].to_numpy()) for datum in datums]
        field.data = b"".join(parts)
        field.offsets = raw(np.cumsum([0, *map(len, parts)], dtype=np.int64))
        field.dtype = dtype_number(first)
        field.trailing_shape.extend(first.shape[1:])


def _parse_record(record: Any) -> list[LossFnOutput]:
    count = record.num_datums
    if not 0 <= count <= _MAX_DATUMS:
        raise WireError(f"num_datums: expected 0 to {_MAX_DATUMS}, got {count}")
    datums: list[LossFnOutput] = [{} for _ in range(count)]
    for name, field in record.fields.items():
        tensors = _split(field, name)
        if len(tensors) != count:
            raise WireError(f"{name}: expected {count} datums, got {len(tensors)}")
        for datum, tensor in zip(datums, tensors, strict=True):
            datum[name] = tensor
    return datums


def _split(field: Any, name: str) -> list[TensorData]:
    """A `BatchedTensor` as one tensor per datum: views of one array, which a user may change."""
    data = bytearray(field.data)
    values = array_of(data, field.dtype, name)
    trailing = check_shape(field.trailing_shape, name)
    width = math.prod(trailing)
    item = len(data) // values.size if values.size else 1  # bytes of a value on the wire
    offsets = numbers(field.offsets, _OFFSET, f"{name}: offsets")
    step = item * max(width, 1)
    if (
        offsets.size == 0
        or offsets[0] < 0
        or offsets[-1] > len(data)
        or (offsets[1:] < offsets[:-1]).any()
        or (offsets % step).any()
    ):
        raise WireError(f"{name}: expected byte offsets rising from 0 to {len(data)} in steps of {step}")
    bounds = (offsets // item).tolist()
    return [
        TensorData.wrap(values[start:end].reshape([(end - start) // width if width else 0, *trailing]))
        for start, end in itertools.pairwise(bounds)
    ]
