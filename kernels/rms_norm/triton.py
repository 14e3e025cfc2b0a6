"""RMSNorm in Triton: one program a row, the row in registers between the sum of squares and the product.

With an adapter's S a program takes some rows and passes over them twice, the second time from L2: S is summed from the
rounded y while it is in registers, so neither y nor another launch is needed for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mint_engine.kernels.bordered_linear import Shrink
from mint_engine.kernels.bordered_linear.triton import matmul
from mint_engine.kernels.gpu_plan import FUSED, Row, Tunable
from mint_engine.kernels.triton_common import UPCAST, architecture, dot, power_of_2, row_warps
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401


def _shared(row: Row, ranks: int) -> int:
    return 2 * row["stages"] * row["BK"] * (2 * row["BM"] + ranks)


SHRINK = Tunable(
    "rms_norm.shrink", {"BM": (16, 32, 64), "BK": (64, 128, 256), "warps": (4, 8), "stages": (1, 2, 3)},
    cases=(16, 32, 64, 128, 256), shared=_shared,
)  # fmt: skip


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
def _norm_shrink(
    x, x_row, residual, residual_row, weight, y, y_row, h, h_row, a, a_row, s, s_row, m, width, ranks, scale, eps,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BM rows a program: once over them for the sums of squares, again (from L2) for y and S."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    here = (row < m)[:, None]
    row = row.to(tl.int64)[:, None]
    step, rank = tl.arange(0, BK), tl.arange(0, R)
    squares = tl.zeros((BM,), tl.float32)
    for at in range(0, width, BK):
        columns = (at + step)[None, :]
        mask = here & (columns < width)
        value = tl.load(x + row * x_row + columns, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            value += tl.load(residual + row * residual_row + columns, mask=mask, other=0.0).to(tl.float32)
            rounded = value.to(h.dtype.element_ty)
            tl.store(h + row * h_row + columns, rounded, mask=mask)
            value = rounded.to(tl.float32)
        squares += tl.sum(value * value, 1)
    tl.debug_barrier()  # h is read back by other threads than wrote it
    r = tl.rsqrt(squares / width + eps)[:, None]
    acc = tl.zeros((BM, R), tl.float32)
    for at in range(0, width, BK):
        columns = (at + step)[None, :]
        mask = here & (columns < width)
        value = tl.load(h + row * h_row + columns, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + at + step, mask=at + step < width, other=0.0).to(tl.float32)[None, :]
        rounded = (value * r * w).to(y.dtype.element_ty)
        tl.store(y + row * y_row + columns, rounded, mask=mask)
        factor = tl.load(
            a + rank.to(tl.int64)[None, :] * a_row + (at + step)[:, None],
            mask=(rank < ranks)[None, :] & (at + step < width)[:, None], other=0.0,
        )  # fmt: skip
        acc = dot(rounded, factor, acc, UPCAST)
    tl.store(s + row * s_row + rank[None, :], (acc * scale).to(s.dtype.element_ty), mask=here & (rank < ranks)[None, :])


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
    added = 0 if residual is None else residual.stride(0)
    if not m:
        return
    if shrink is not None and 0 < len(shrink.a) <= SHRINK.cases[-1]:
        ranks = power_of_2(len(shrink.a), 16)
        meta = SHRINK.meta(architecture(), ranks)
        if x.dtype is torch.float32:  # for tests: twice as wide
            meta["num_stages"], meta["BK"] = 1, 64
        _norm_shrink[(triton.cdiv(m, meta["BM"]),)](
            x, x.stride(0), residual, added, weight, y, y.stride(0), h, h.stride(0), shrink.a, shrink.a.stride(0),
            shrink.s, shrink.s.stride(0), m, width, len(shrink.a), float(shrink.scale), eps, R=ranks, UPCAST=UPCAST,
            **meta,
        )  # fmt: skip
        return
    block = power_of_2(width)
    _forward[(m,)](
        x, x.stride(0), residual, added, weight, y, y.stride(0), h, h.stride(0), width, eps, BLOCK=block,
        num_warps=row_warps(block), **FUSED,
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
            dh, dh.stride(0), width, eps, BLOCK=block, num_warps=row_warps(block), **FUSED,
        )  # fmt: skip
