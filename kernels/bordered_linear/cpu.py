"""oneDNN GEMMs on strided views of the bordered buffer, and C++ dot products (csrc/logits.h) where rows are few.

torch.mm hands the row strides to oneDNN as they are, so no view is copied (README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels.bordered_linear.reference import bordered_linear_backward, expand_backward, shrink
from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports

__all__ = ["bordered_linear", "bordered_linear_backward", "expand_backward", "shrink", "supports"]

FEW_ROWS = 8  # up to here reading the weight is all of the time, and the dot products read it faster (README.md)


def bordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    m, n = x.shape[0], weight.shape[0]
    if m > FEW_ROWS:
        return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    y = torch.empty((m, n), dtype=torch.float32)
    native.logits(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), y.data_ptr(), n,
        m, n, x.shape[1],
    )  # fmt: skip
    return (y if bias is None else y.add_(bias)).to(x.dtype)
