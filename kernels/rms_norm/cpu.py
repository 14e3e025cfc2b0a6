"""RMSNorm in C++ (csrc/rms_norm.h)."""

from __future__ import annotations

import torch

from mint_engine.kernels.bordered_linear import Shrink
from mint_engine.kernels.op import NATIVE_DTYPES, native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    h: torch.Tensor,
    shrink: Shrink | None,
) -> None:
    m, width = x.shape
    added = (0, 0, 0, 0)
    if residual is not None:
        added = (residual.data_ptr(), residual.stride(0), h.data_ptr(), h.stride(0))
    norm = (x.data_ptr(), x.stride(0), *added, weight.data_ptr(), eps, y.data_ptr(), y.stride(0))
    code = NATIVE_DTYPES[x.dtype]
    if shrink is None:
        native.rms_norm(code, *norm, m, width)
        return
    a, scale, s = shrink
    native.rms_norm_shrink(code, *norm, a.data_ptr(), a.stride(0), scale, s.data_ptr(), s.stride(0), m, width, len(a))


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dresidual: torch.Tensor | None,
    dh: torch.Tensor,
) -> None:
    m, width = h.shape
    skip = (0, 0) if dresidual is None else (dresidual.data_ptr(), dresidual.stride(0))
    native.rms_norm_backward(
        NATIVE_DTYPES[h.dtype], dy.data_ptr(), dy.stride(0), h.data_ptr(), h.stride(0), weight.data_ptr(), eps,
        *skip, dh.data_ptr(), dh.stride(0), m, width,
    )  # fmt: skip
