"""Matrix products of the cpu faces in our own GEMM (csrc/gemm.h, csrc/matmul.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels.op import NATIVE_DTYPES, native


def mm(a: Tensor, b: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """``out[M, N] = scale * (a[M, K] @ b[K, N]) + bias[N]``: fp32 sums, rounded once to the dtype of ``a``.

    ``a`` and ``out`` have unit stride in their last dimension, ``b`` in either (a weight is passed as ``weight.T``);
    all have one dtype, float32 or bfloat16, and shapes that fit: callers have checked them. ``out`` may be a view,
    but not of ``a`` or ``b``. A result does not depend on the number of threads, nor a row on the others.
    """
    (m, k), n = a.shape, b.shape[1]
    if out is None:
        out = torch.empty((m, n), dtype=a.dtype)
    column, row = (1, b.stride(0)) if b.stride(1) == 1 else (b.stride(1), 1)
    native.matmul(
        NATIVE_DTYPES[a.dtype], a.data_ptr(), a.stride(0), b.data_ptr(), column, row,
        0 if bias is None else bias.data_ptr(), out.data_ptr(), out.stride(0), m, n, k, scale,
    )  # fmt: skip
    return out
