"""RMSNorm in C++ (csrc/rms_norm.h)."""

from __future__ import annotations

import torch

from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    m, width = x.shape
    if residual is None:
        h, pointers = x, (0, 0, 0, 0)
    else:
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
        pointers = (residual.data_ptr(), residual.stride(0), h.data_ptr(), h.stride(0))
    native.rms_norm(
        NATIVE_DTYPES[x.dtype], x.data_ptr(), x.stride(0), *pointers, weight.data_ptr(), eps,
        y.data_ptr(), y.stride(0), m, width,
    )  # fmt: skip
    return y, h


def rms_norm_backward(
    dy: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, eps: float, dresidual: torch.Tensor | None
) -> torch.Tensor:
    m, width = h.shape
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    skip = (0, 0) if dresidual is None else (dresidual.data_ptr(), dresidual.stride(0))
    native.rms_norm_backward(
        NATIVE_DTYPES[h.dtype], dy.data_ptr(), dy.stride(0), h.data_ptr(), h.stride(0), weight.data_ptr(), eps,
        *skip, dh.data_ptr(), width, m, width,
    )  # fmt: skip
    return dh
