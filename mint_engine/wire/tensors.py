"""Tensors in protobuf: raw little-endian bytes, dense or CSR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mint_engine.errors import UserError
from mint_engine.types import TensorData
from mint_engine.wire import messages
from mint_engine.wire.errors import WireError

MAX_DENSE_VALUES = 1 << 25
"""Most values that the sparse tensors of one body may have when they are made dense (256 MiB of int64)."""

_MAX_SIZE = 1 << 31
_MAX_DIMENSIONS = 8

_DTYPES: dict[int, np.dtype[Any]] = {
    messages.FLOAT32: np.dtype("<f4"),
    messages.INT64: np.dtype("<i8"),
    messages.INT32: np.dtype("<i4"),
    messages.BFLOAT16: np.dtype("<u2"),
}


class DenseBudget:
    """How many values the sparse tensors of a body may still become: a few bytes of CSR can declare any shape."""

    def __init__(self, values: int = MAX_DENSE_VALUES) -> None:
        self._values = self._left = values

    def take(self, shape: Sequence[int], name: str) -> None:
        """Raises WireError when `shape` is more than is left."""
        self._left -= math.prod(shape)
        if self._left < 0:
            raise WireError(f"{name}: expected sparse tensors of at most {self._values} values when made dense")


def array_of(data: bytes | bytearray, dtype: int, name: str) -> np.ndarray:
    """The numbers in `data`: int64 or float32, flat. A view of `data` where the width is the same.

    Raises WireError for a dtype that is not known, or bytes that are no whole number of values.
    """
    kind = _DTYPES.get(dtype)
    if kind is None:
        raise WireError(f"{name}: expected dtype float32, int64, int32 or bfloat16, got number {dtype}")
    values = numbers(data, kind, name)
    if dtype == messages.BFLOAT16:  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64) if dtype == messages.INT32 else values


def numbers(data: bytes | bytearray, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """A view of `data` as `dtype`. Raises WireError when the bytes are no whole number of values."""
    if len(data) % dtype.itemsize:
        raise WireError(f"{name}: expected a multiple of {dtype.itemsize} bytes for {dtype.name}, got {len(data)}")
    return np.frombuffer(data, dtype)


def check_shape(shape: Sequence[int], name: str) -> list[int]:
    """The shape as a list. Raises WireError for sizes that no array here has."""
    if len(shape) > _MAX_DIMENSIONS or any(not 0 <= n < _MAX_SIZE for n in shape):
        raise WireError(f"{name}: expected a shape of at most {_MAX_DIMENSIONS} sizes below 2^31, got {shape[:9]}")
    return list(shape)


def parse_tensor(message: Any, name: str, budget: DenseBudget) -> TensorData:
    """A `Tensor` message as TensorData; a dense one without a shape has one dimension. Raises WireError."""
    shape = check_shape(message.shape, name)
    kind = message.WhichOneof("encoding")
    if kind == "sparse_csr":
        csr = message.sparse_csr
        index = _DTYPES[messages.INT64]
        return sparse(
            array_of(csr.values, message.dtype, name),
            numbers(csr.crow_indices, index, f"{name}: crow_indices"),
            numbers(csr.col_indices, index, f"{name}: col_indices"),
            shape, name, budget,
        )  # fmt: skip
    values = array_of(message.dense, message.dtype, name)
    return dense(values, shape or [values.size], name)


def dense(values: np.ndarray, shape: list[int], name: str) -> TensorData:
    """Flat `values` of `shape`. Raises WireError when they do not fill it."""
    if math.prod(shape) != values.size:
        raise WireError(f"{name}: expected {math.prod(shape)} values to fill shape {shape}, got {values.size}")
    return TensorData.wrap(values.reshape(shape))


def sparse(
    values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: list[int], name: str, budget: DenseBudget
) -> TensorData:
    """CSR of `shape`. Raises WireError when the parts do not agree, or are too much when dense."""
    if len(shape) != 2:
        raise WireError(f"{name}: expected a shape of two sizes for a sparse tensor, got {shape}")
    budget.take(shape, name)
    try:
        return TensorData.wrap_sparse(values, crow, col, shape)
    except UserError as error:
        raise WireError(f"{name}: {error}") from None


def write_tensor(message: Any, tensor: TensorData) -> None:
    """Fill a `Tensor` message; a sparse tensor stays sparse."""
    message.dtype = dtype_number(tensor)
    message.shape.extend(tensor.shape)
    if tensor.csr is None:
        message.dense = raw(tensor.to_numpy())
    else:
        values, crow, col = tensor.csr
        message.sparse_csr.values = raw(values)
        message.sparse_csr.crow_indices = raw(crow)
        message.sparse_csr.col_indices = raw(col)


def dtype_number(tensor: TensorData) -> int:
    return messages.INT64 if tensor.dtype == "int64" else messages.FLOAT32


def raw(array: np.ndarray) -> bytes:
    """The little-endian bytes of an array."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
