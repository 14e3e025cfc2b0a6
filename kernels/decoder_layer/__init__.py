"""A whole layer of a training pass in one C++ call, forward or backward (csrc/decoder_layer.h).

Nothing is computed that `models/layer.py` does not compute by the ops one by one, which is the reference: with one
adapter the bits are the same. What it saves is Python between some fifteen ops a direction, a fifth of a step of a few
hundred tokens. It is chosen by that file, where :func:`decoder_layer_supported` says so.

The arguments are structs of 8-byte fields, as rows of int64; the header names the fields. Whoever makes them answers
for shapes and addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mint_engine.kernels import plan
from mint_engine.kernels.op import NATIVE_DTYPES, in_native, native

__all__ = ["decoder_layer", "decoder_layer_backward", "decoder_layer_supported", "op_by_op"]

_op_by_op = False


def decoder_layer_supported(*tensors: Tensor) -> bool:
    """Whether the ops of a layer on these tensors would all run in C++, large products included."""
    return not _op_by_op and in_native(*tensors) and plan.ours(tensors[0].dtype)


def decoder_layer(
    dtype: torch.dtype, weights: np.ndarray, shared: np.ndarray, room: np.ndarray, eps: float, scale: float
) -> None:
    """``weights``: a LayerWeights; ``shared``: a LayerPass; ``room``: a ForwardRoom. ``scale``: of the scores."""
    native.decoder_layer(NATIVE_DTYPES[dtype], weights.ctypes.data, shared.ctypes.data, room.ctypes.data, eps, scale)


def decoder_layer_backward(
    dtype: torch.dtype, weights: np.ndarray, shared: np.ndarray, room: np.ndarray, eps: float, scale: float
) -> None:
    """The same with a BackwardRoom."""
    native.decoder_layer_backward(
        NATIVE_DTYPES[dtype], weights.ctypes.data, shared.ctypes.data, room.ctypes.data, eps, scale
    )


@contextmanager
def op_by_op() -> Iterator[None]:
    """Until the block ends, layers are not one call, process-wide: to time the ops, and to compare the two."""
    global _op_by_op
    before, _op_by_op = _op_by_op, True
    try:
        yield
    finally:
        _op_by_op = before
