"""Our own GEMM on strided views of the bordered buffer, or torch's library where kernels/plan.py says so.

A forward of at most ``FEW_ROWS`` rows is ours everywhere: reading the weight is all of the time there, and few_rows.h
reads it faster. No view is copied (README.md).
"""

from __future__ import annotations

from torch import Tensor

from mint_engine.kernels import plan
from mint_engine.kernels.bordered_linear import reference
from mint_engine.kernels.gemm import mm
from mint_engine.kernels.op import native_reason as supports

__all__ = ["bordered_linear", "bordered_linear_backward", "expand_backward", "shrink", "supports"]

FEW_ROWS = 8


def shrink(x: Tensor, a: Tensor, scale: float, out: Tensor) -> Tensor:
    return mm(x, a.T, scale=scale, out=out) if plan.ours(x.dtype) else reference.shrink(x, a, scale, out)


def bordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if x.shape[0] <= FEW_ROWS or plan.ours(x.dtype):
        return mm(x, weight.T, bias=bias, out=out)
    return reference.bordered_linear(x, weight, bias, out)


def bordered_linear_backward(dy: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return mm(dy, weight, out=out) if plan.ours(dy.dtype) else reference.bordered_linear_backward(dy, weight, out)


def expand_backward(dy: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    return mm(dy, b, scale=scale, out=out) if plan.ours(dy.dtype) else reference.expand_backward(dy, b, scale, out)
