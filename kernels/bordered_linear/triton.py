"""Bordered linears on a GPU: the large products through the library, the narrow ones (S, dS) through a Triton GEMM.

The Triton GEMM is tiled as usual: a program owns a tile of y, sums in fp32 registers, tiles of K pipelined through
shared memory. For `bordered_by_tile` its last tiles of K are the border, looked up for each tile of rows; `logits` uses
it for its fp32 output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.bordered_linear.reference import bordered_linear, bordered_linear_backward
from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.triton_common import UPCAST, architecture, dot, power_of_2, tile_of
from mint_engine.kernels.triton_common import triton_reason as supports

__all__ = [
    "bordered_linear",
    "bordered_linear_backward",
    "expand_backward",
    "matmul",
    "shrink",
    "supports",
]

WIDEST = 64  # columns of a narrow product


def _narrow(row: Row, columns: int) -> int:
    return 2 * row["stages"] * row["BK"] * (row["BM"] + columns)


def _wide(row: Row, rows: int) -> int:
    return 2 * row["stages"] * row["BK"] * (rows + row["BN"])


# A narrow product (S, dS) is a pass over x: few rows a program, so that there are programs for every multiprocessor.
NARROW = Tunable(
    "bordered_linear.narrow", {"BM": (16, 32, 64, 128), "BK": (64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=(16, 32, 64), shared=_narrow,
)  # fmt: skip
WIDE = Tunable(
    "bordered_linear.wide",
    {"BN": (64, 128, 256), "BK": (32, 64, 128), "GROUP": (4, 8, 16), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=(16, 32, 64, 128, 256), shared=_wide,
)  # fmt: skip


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
    if not (m and n):
        return out
    if n <= WIDEST and not tile_rows:
        columns = power_of_2(n, 16)
        meta = {**NARROW.meta(architecture(), columns), "BN": columns, "GROUP": 1}
        meta["BM"] = min(meta["BM"], power_of_2(m, 16))
    else:
        rows = tile_rows or min(128, power_of_2(m, 16))
        meta = {**WIDE.meta(architecture(), rows), "BM": rows}
        meta["BN"] = min(meta["BN"], power_of_2(n, 16))
    if x.dtype is torch.float32:  # for tests: twice as wide
        meta["num_stages"], meta["BK"] = 2, min(meta["BK"], 64)
    _matmul[(triton.cdiv(m, meta["BM"]) * triton.cdiv(n, meta["BN"]),)](
        x, x.stride(0), w, w.stride(1), w.stride(0), out, out.stride(0), bias, spans, m, n, k, float(scale),
        UPCAST=UPCAST, **meta,
    )  # fmt: skip
    return out


def shrink(x: Tensor, a: Tensor, scale: float, out: Tensor) -> Tensor:
    return matmul(x, a.T, out, scale=scale)


def expand_backward(dy: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    return matmul(dy, b, out, scale=scale)
