"""RMSNorm in Triton: one program a row, the row in registers between the sum of squares and the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mint_engine.kernels.bordered_linear import Shrink
from mint_engine.kernels.bordered_linear.triton import matmul
from mint_engine.kernels.triton_common import power_of_2, row_warps
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401


@triton.jit
def _forward(x, x_row, residual, residual_row, weight, y, y_row, h, h_row, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_row + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + row * h_row + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the backward only has the rounded one
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(y + row * y_row + columns, (value * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy, dy_row, h, h_row, weight, skip, skip_row, dh, dh_row, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(h + row * h_row + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + row * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    out = r * (g - value * (r * r * tl.sum(g * value, 0) / width))
    if skip is not None:
        out += tl.load(skip + row * skip_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dh + row * dh_row + columns, out.to(dh.dtype.element_ty), mask=inside)


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
    block = power_of_2(width)
    if m:
        _forward[(m,)](
            x, x.stride(0), residual, 0 if residual is None else residual.stride(0), weight, y, y.stride(0),
            h, h.stride(0), width, eps, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
    if shrink is not None:
        matmul(y, shrink.a.T, shrink.s, scale=shrink.scale)


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dresidual: torch.Tensor | None,
    dh: torch.Tensor,
) -> None:
    m, width = h.shape
    block = power_of_2(width)
    if m:
        _backward[(m,)](
            dy, dy.stride(0), h, h.stride(0), weight, dresidual, 0 if dresidual is None else dresidual.stride(0),
            dh, dh.stride(0), width, eps, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
