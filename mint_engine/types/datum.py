"""`Datum`: one training example, the model's input and the tensors of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mint_engine.errors import UserError
from mint_engine.types.model_input import ModelInput
from mint_engine.types.tensor_data import TensorData, TensorDtype, cast_array, is_torch_tensor

LossFnInputs = dict[str, TensorData]

# What the losses expect under each name; other names keep the dtype they come with.
LOSS_INPUT_DTYPES: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}


@dataclass(frozen=True)
class Datum:
    """One training example.

    Args:
        model_input: the N tokens the model reads.
        loss_fn_inputs: tensors by name. Lists, numpy arrays and torch tensors become `TensorData`: target_tokens
            int64, weights, advantages, logprobs and clip thresholds float32, any other name as its values are.

    Raises:
        UserError (a ValueError): a value that is no tensor of numbers, or target tokens that are not integers.

    Lengths and ranges are checked when the datum is used, where the model is known.
    """

    model_input: ModelInput
    loss_fn_inputs: LossFnInputs = field(default_factory=dict)

    if TYPE_CHECKING:

        def __init__(self, model_input: ModelInput, loss_fn_inputs: Mapping[str, Any] = ...) -> None: ...

    def __post_init__(self) -> None:
        model_input: Any = self.model_input
        if isinstance(model_input, Mapping):
            object.__setattr__(self, "model_input", ModelInput.model_validate(model_input))
        elif not isinstance(model_input, ModelInput):
            raise UserError(
                f"model_input: expected a ModelInput, got {type(model_input).__name__}; "
                "use ModelInput.from_ints(tokens)"
            )
        if not isinstance(self.loss_fn_inputs, Mapping):
            raise UserError(f"loss_fn_inputs: expected a dict, got {type(self.loss_fn_inputs).__name__}")
        inputs = {key: as_tensor_data(key, value) for key, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", inputs)

    @classmethod
    def of_arrays(cls, tokens: np.ndarray, loss_fn_inputs: LossFnInputs) -> Datum:
        """A datum of token ids in an integer array [N] and of tensors of the right dtypes. Nothing is checked or
        copied; `model_input` is made if somebody asks for it."""
        datum = cls.__new__(cls)
        datum.__dict__.update(_tokens=tokens, loss_fn_inputs=loss_fn_inputs)
        return datum

    def __getattr__(self, name: str) -> Any:
        tokens = self.__dict__.get("_tokens")
        if name != "model_input" or tokens is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        model_input = ModelInput.of_tokens(tokens.tolist())
        object.__setattr__(self, "model_input", model_input)
        return model_input

    def token_array(self) -> np.ndarray:
        """The token ids, int64 [N]. Raises OverflowError for an id beyond 64 bits."""
        tokens: np.ndarray | None = self.__dict__.get("_tokens")
        return self.model_input.token_array() if tokens is None else tokens.astype(np.int64, copy=False)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model reads."""
        tokens = self.__dict__.get("_tokens")
        return self.model_input.length if tokens is None else len(tokens)


def as_tensor_data(name: str, value: Any, dtype: TensorDtype | None = None) -> TensorData:
    """`value` as TensorData of `dtype`, or of what the loss input `name` wants. Raises UserError if it cannot be."""
    if isinstance(value, Mapping):
        value = TensorData(**value)
    dtype = dtype or LOSS_INPUT_DTYPES.get(name)
    if isinstance(value, TensorData):
        if dtype is None or value.dtype == dtype:
            return value
        record = value.to_dict() | {"data": cast_array(value.data, dtype, name), "dtype": dtype}
        return TensorData(**record)
    if not (isinstance(value, (list, tuple, np.ndarray)) or is_torch_tensor(value)):
        raise UserError(f"{name}: expected a list, an array or TensorData, got {type(value).__name__}")
    if dtype is None:
        dtype = "float32" if _holds_floats(value) else "int64"
    return TensorData(cast_array(value, dtype, name), dtype)


def _holds_floats(value: Any) -> bool:
    if is_torch_tensor(value):
        return bool(value.is_floating_point())
    try:
        return np.asarray(value).dtype.kind == "f"
    except ValueError:
        return False  # ragged: cast_array says so
