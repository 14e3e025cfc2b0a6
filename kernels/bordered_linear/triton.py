"""Bordered linears on a GPU: one adapter through the library, many through a Triton GEMM.

The Triton GEMM is tiled as usual (a program owns a tile of y, sums in fp32 registers, tiles of K pipelined through
shared memory). Its last tiles of K are the border: where they lie is looked up for each tile of rows, so a pass with
many adapters does the work of a pass with one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.bordered_linear.reference import bordered_linear, bordered_linear_backward
from mint_engine.kernels.triton_common import GROUP, UPCAST, dot, power_of_2, tile_of, triton_reason

__all__ = [
    "bordered_linear",
    "bordered_linear_backward",
    "expand_backward",
    "grouped_linear",
    "grouped_linear_backward",
    "matmul",
    "shrink",
    "supports",
]


def supports(x: Tensor, *rest: Tensor | None) -> str | None:
    """Why this face cannot run on these tensors, or None. An int32 tensor is a table of spans."""
    for t in rest:
        if t is not None and t.dtype is torch.int32 and t.device != x.device:
            return f"mixed devices {x.device} and {t.device}"
    return triton_reason(x, *(t for t in rest if t is None or t.dtype is not torch.int32))


@triton.jit
def _matmul(
    x, x_row, w, w_n, w_k, y, y_row, bias, spans, m, n, k, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    tile_m, tile_n = tile_of(tiles_m, tiles_n, GROUP)
    row, column, step = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows and columns past the end read valid ones again; their results are not stored.
    x_tile = x + (row % m).to(tl.int64)[:, None] * x_row
    w_tile = w + (column % n).to(tl.int64)[None, :] * w_n
    base = tl.cdiv(k, BK)
    if spans is not None:
        # Multiples of 16 by contract: without these hints a load would be of single elements, and not asynchronous.
        source = tl.multiple_of(tl.load(spans + tile_m * 3), 16)
        border = tl.multiple_of(tl.load(spans + tile_m * 3 + 1), 16)
        width = tl.multiple_of(tl.load(spans + tile_m * 3 + 2), 16)
        tiles = base + tl.cdiv(width, BK)
    else:
        tiles = base

    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(tiles):
        at = i * BK + step
        x_at, w_at, inside = at, at, at < k
        if spans is not None:
            in_border = i >= base
            at -= base * BK
            x_at = tl.where(in_border, source + at, x_at)
            w_at = tl.where(in_border, border + at, w_at)
            inside = tl.where(in_border, at < width, inside)
        a = tl.load(x_tile + x_at[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(w_tile + w_at.to(tl.int64)[:, None] * w_k, mask=inside[:, None], other=0.0)
        acc = dot(a, b, acc, UPCAST)
    acc *= scale
    if bias is not None:
        acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    mask = (row < m)[:, None] & (column < n)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * y_row + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


def matmul(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    k: int | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    spans: Tensor | None = None,
    tile_rows: int = 0,
) -> Tensor:
    """``out[M, N] = scale * x[M, :k] @ w[:k]`` (+ border by ``spans``) + bias; ``w [K, N]`` of any two strides."""
    (m, n), k = out.shape, x.shape[1] if k is None else k
    bn = min(128, power_of_2(n, 16))
    # A narrow product is a pass over x: fewer rows a program, so that there are programs for every multiprocessor.
    bm = tile_rows or min(128 if bn > 64 else 64, power_of_2(m, 16))
    bk = 64 if min(bm, bn) > 32 else 128
    if m and n:
        _matmul[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
            x, x.stride(0), w, w.stride(1), w.stride(0), out, out.stride(0), bias, spans, m, n, k, float(scale),
            BM=bm, BN=bn, BK=bk, GROUP=GROUP, UPCAST=UPCAST,
            num_warps=8 if bm * bn >= 128 * 128 else 4, num_stages=3,
        )  # fmt: skip
    return out


def shrink(x: Tensor, a: Tensor, scale: float, out: Tensor) -> Tensor:
    return matmul(x, a.T, out, scale=scale)


def expand_backward(dy: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    return matmul(dy, b, out, scale=scale)


def grouped_linear(x: Tensor, weight: Tensor, spans: Tensor, k: int, tile_rows: int, bias: Tensor | None) -> Tensor:
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    return matmul(x, weight.T, y, k=k, bias=bias, spans=spans, tile_rows=tile_rows)


def grouped_linear_backward(dy: Tensor, weight: Tensor, spans: Tensor, n: int, tile_rows: int) -> Tensor:
    dx = torch.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype, device=dy.device)
    return matmul(dy, weight, dx, k=n, spans=spans, tile_rows=tile_rows)
