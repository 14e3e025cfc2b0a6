"""Whole layers of a training pass in one C++ call, forward or backward (csrc/decoder_layer.h).

Nothing is computed that `models/layer.py` does not compute by the ops one by one, which is the reference: with one
adapter the bits are the same. What it saves is Python between some fifteen ops a direction and between layers, a fifth
of a step of a few hundred tokens. It is chosen by that file, where :func:`decoder_layer_supported` says so.

The arguments are structs of 8-byte fields, as rows of int64; the header names the fields. Whoever makes them answers
for shapes and addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mint_engine.kernels import plan
from mint_engine.kernels.op import NATIVE_DTYPES, in_native, native

__all__ = ["LayerCall", "decoder_layer_supported", "decoder_layers", "decoder_layers_backward", "op_by_op"]

_op_by_op = False


def decoder_layer_supported(*tensors: Tensor) -> bool:
    """Whether the ops of a layer on these tensors would all run in C++, large products included."""
    return not _op_by_op and in_native(*tensors) and plan.ours(tensors[0].dtype)


class LayerCall(NamedTuple):
    """One layer: a LayerWeights, a LayerPass, a ForwardRoom or BackwardRoom, and what must live as long."""

    weights: np.ndarray
    shared: np.ndarray
    room: np.ndarray
    kept: object = None


def decoder_layers(dtype: torch.dtype, layers: Sequence[LayerCall], eps: float, scale: float) -> None:
    """The layers one after the other. ``scale``: of the attention's scores."""
    _run(native.decoder_layers, dtype, layers, eps, scale)


def decoder_layers_backward(dtype: torch.dtype, layers: Sequence[LayerCall], eps: float, scale: float) -> None:
    """The same with BackwardRooms, the last layer first."""
    _run(native.decoder_layers_backward, dtype, layers, eps, scale)


def _run(run: Any, dtype: torch.dtype, layers: Sequence[LayerCall], eps: float, scale: float) -> None:
    table = np.array([t.ctypes.data for layer in layers for t in layer[:3]], dtype=np.int64)
    run(NATIVE_DTYPES[dtype], table.ctypes.data, len(layers), eps, scale)


@contextmanager
def op_by_op() -> Iterator[None]:
    """Until the block ends, layers are not one call, process-wide: to time the ops, and to compare the two."""
    global _op_by_op
    before, _op_by_op = _op_by_op, True
    try:
        yield
    finally:
        _op_by_op = before
