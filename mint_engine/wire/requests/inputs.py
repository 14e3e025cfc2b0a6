"""Model inputs and tensors inside JSON bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, InstanceOf, PlainSerializer, WithJsonSchema

from mint_engine.types import ModelInput, TensorData
from mint_engine.wire.errors import WireError
from mint_engine.wire.json_values import model_input_from_json, tensor_from_json
from mint_engine.wire.tensors import DenseBudget

_PROMPT_SCHEMA = {
    "type": "object",
    "required": ["chunks"],
    "properties": {
        "chunks": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tokens"],
                "properties": {
                    "type": {"const": "encoded_text"},
                    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                },
            },
        }
    },
}
_TENSOR_SCHEMA = {
    "type": "object",
    "required": ["data", "dtype"],
    "properties": {
        "data": {"type": "array", "items": {"type": "number"}},
        "dtype": {"enum": ["int64", "float32"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "sparse_crow_indices": {"type": "array", "items": {"type": "integer"}},
        "sparse_col_indices": {"type": "array", "items": {"type": "integer"}},
    },
}


_MAX_DENSE_VALUES = 1 << 22  # of a sparse tensor; 32k prompt tokens with 128 targets each


def _model_input(value: Any) -> Any:
    return value if isinstance(value, ModelInput) else model_input_from_json(value, "chunks")


def _tensor(value: Any) -> Any:
    return value if isinstance(value, TensorData) else tensor_from_json(value, "data", DenseBudget(_MAX_DENSE_VALUES))


def _dense(tensor: TensorData) -> TensorData:
    if tensor.csr is not None:
        raise WireError("data: expected a dense tensor, got a sparse one")
    return tensor


def _dump_input(value: ModelInput) -> Mapping[str, Any]:
    return {"chunks": [{"type": "encoded_text", "tokens": value.to_ints()}]}


JsonModelInput: TypeAlias = Annotated[
    InstanceOf[ModelInput], BeforeValidator(_model_input), PlainSerializer(_dump_input), WithJsonSchema(_PROMPT_SCHEMA)
]
JsonTensor: TypeAlias = Annotated[
    InstanceOf[TensorData],
    BeforeValidator(_tensor),
    PlainSerializer(TensorData.to_dict),
    WithJsonSchema(_TENSOR_SCHEMA),
]
JsonDenseTensor: TypeAlias = Annotated[JsonTensor, AfterValidator(_dense)]
