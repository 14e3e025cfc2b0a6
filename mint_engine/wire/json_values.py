"""Model inputs, tensors and ids in JSON that has been parsed.

Lists become arrays through `array`, which takes numbers and nothing else: numpy would read strings as numbers, or make
room for the longest string in every cell.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mint_engine.types import ModelInput, TensorData
from mint_engine.wire.errors import WireError, show
from mint_engine.wire.tensors import DenseBudget, check_shape, dense, sparse

LONGEST_NAME = 512
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def model_input_from_json(value: Any, name: str = "model_input") -> ModelInput:
    """`{"chunks": [{"type": "encoded_text", "tokens": [...]}, ...]}`, as one chunk. Raises WireError."""
    return ModelInput.of_tokens(tokens_from_json(value, name).tolist())


def tokens_from_json(value: Any, name: str) -> np.ndarray:
    """The tokens of all chunks of a model input, int64. Raises WireError; images and audio are refused by name."""
    chunks = value.get("chunks") if isinstance(value, Mapping) else None
    if not isinstance(chunks, list):
        raise WireError(f"{name}: expected an object with a list of chunks, got {show(value)}")
    parts = [_chunk_tokens(chunk, name) for chunk in chunks]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _chunk_tokens(chunk: Any, name: str) -> np.ndarray:
    if not isinstance(chunk, Mapping):
        raise WireError(f"{name}: expected chunks to be objects, got {show(chunk)}")
    kind = chunk.get("type") or "encoded_text"
    if kind != "encoded_text":
        raise WireError(
            f"{name}: expected encoded_text chunks, got {show(kind)}: image and audio inputs are not supported here"
        )
    return integers(chunk.get("tokens"), f"{name}: tokens")


def tensor_from_json(value: Any, name: str = "tensor", budget: DenseBudget | None = None) -> TensorData:
    """`{"data": [...], "dtype": ..., "shape": [...]}`, dense or CSR; a scalar `data` has no dimensions.

    Raises WireError.
    """
    if not isinstance(value, Mapping):
        raise WireError(f"{name}: expected an object with data and dtype, got {show(value)}")
    dtype, shape = value.get("dtype"), value.get("shape")
    if dtype not in ("int64", "float32"):
        raise WireError(f"{name}: expected dtype 'int64' or 'float32', got {show(dtype)}")
    data = value.get("data")
    scalar = isinstance(data, (int, float)) and shape is None
    values = (integers if dtype == "int64" else floats)([data] if isinstance(data, (int, float)) else data, name)
    if shape is None:
        sizes = [] if scalar else [values.size]
    else:
        sizes = check_shape(integers(shape, f"{name}: shape").tolist(), name)
    crow, col = value.get("sparse_crow_indices"), value.get("sparse_col_indices")
    if crow is None and col is None:
        return dense(values, sizes, name)
    crow, col = integers(crow, f"{name}: sparse_crow_indices"), integers(col, f"{name}: sparse_col_indices")
    return sparse(values, crow, col, sizes, name, budget or DenseBudget())


def integers(value: Any, name: str) -> np.ndarray:
    """A list of integers as int64. 2.0 is an integer, as in JSON. Raises WireError."""
    try:
        return np.frombuffer(_packed("q", value, name), np.int64)
    except TypeError:
        numbers = np.frombuffer(_packed("d", value, name), np.float64)
    if not ((np.abs(numbers) < 2**53) & (numbers == np.trunc(numbers))).all():  # NaN is not below
        raise WireError(f"{name}: expected integers, got fractions or numbers beyond 2^53")
    return numbers.astype(np.int64)


def floats(value: Any, name: str) -> np.ndarray:
    """A list of numbers as float32. Raises WireError."""
    numbers = np.frombuffer(_packed("d", value, name), np.float64)
    with np.errstate(over="ignore"):  # the engine refuses infinities and names the datum
        return numbers.astype(np.float32)


def _packed(code: str, value: Any, name: str) -> array[Any]:
    """Raises TypeError for numbers of the other kind, WireError for what is no list of numbers."""
    if not isinstance(value, list):
        raise WireError(f"{name}: expected a list of numbers, got {show(value)}")
    try:
        return array(code, value)
    except OverflowError:
        raise WireError(f"{name}: expected numbers of at most 64 bits, got a larger one") from None
    except TypeError:
        odd = next((v for v in value if not isinstance(v, (int, float))), None)
        if odd is None and None not in value:
            raise
        raise WireError(f"{name}: expected a flat list of numbers, got {show(odd)} in it") from None


def name_from_json(value: Any, name: str) -> str:
    """An id or a name: text of 1 to 512 characters without control characters, which databases and log files do not
    take. Raises WireError."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or _CONTROL.search(value):
        raise WireError(
            f"{name}: expected text of 1 to {LONGEST_NAME} characters without control characters, got {show(value)}"
        )
    return value


def seq_id_from_json(value: Any) -> int | None:
    """The number of a request among those of its model. Raises WireError."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**53):
        raise WireError(f"seq_id: expected an integer from 1, or none, got {show(value)}")
    return value


def finite(values: Iterable[float]) -> list[float | None]:
    """Numbers for JSON: NaN and infinities become None."""
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    out: list[Any] = numbers.tolist()
    for i in np.flatnonzero(~np.isfinite(numbers)):
        out[i] = None
    return out
