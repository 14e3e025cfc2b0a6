"""Many adapters in one Triton GEMM: its last tiles of K are the tile of rows' own border, looked up in a table.

A pass with many adapters does the work of a pass with one. From Hopper on, tiles arrive by TMA and a program works
through many tiles of y (persistent): the loads of the next tile of y start while the last is stored. What TMA cannot
take (odd strides, spans that are not multiples of its tile of K) and older GPUs go through plain pointers, with the
GEMM of `bordered_linear/triton.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mint_engine.kernels.bordered_linear.triton import matmul
from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.triton_common import (
    UPCAST,
    architecture,
    dot,
    power_of_2,
    processors,
    tma_reason,
    triton_reason,
)

ROWS = (16, 32, 64, 128, 256)  # a program's rows: those of a tile of the table


def _shared(row: Row, tile_rows: int) -> int:
    return 2 * (row["stages"] * row["BK"] * (tile_rows + row["BN"]) + tile_rows * row["BN"])


PERSISTENT = Tunable(
    "bordered_by_tile.persistent",
    {"BN": (64, 128, 256), "BK": (64, 128), "GROUP": (4, 8, 16), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=ROWS, shared=_shared, oldest=90,
)  # fmt: skip


def supports(x: Tensor, *rest: Tensor | None) -> str | None:
    """Why this face cannot run on these tensors, or None. The int32 one is the table of spans."""
    for t in rest:
        if t is not None and t.dtype is torch.int32 and t.device != x.device:
            return f"mixed devices {x.device} and {t.device}"
    return triton_reason(x, *(t for t in rest if t is None or t.dtype is not torch.int32))


@triton.jit
def _persistent(
    x, w, y, bias, spans, m, n, base,
    TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``base``: tiles of K before the border. ``TRANSPOSED``: w is [N, K], as in the forward."""
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        group, inner = tile // (GROUP * tiles_n), tile % (GROUP * tiles_n)
        height = min(tiles_m - group * GROUP, GROUP)
        tile_m, tile_n = group * GROUP + inner % height, inner // height
        source, border = tl.load(spans + tile_m * 3), tl.load(spans + tile_m * 3 + 1)
        steps = base + tl.load(spans + tile_m * 3 + 2) // BK
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(steps):
            in_border = i >= base
            x_at = tl.where(in_border, source + (i - base) * BK, i * BK)
            w_at = tl.where(in_border, border + (i - base) * BK, i * BK)
            a = x.load([tile_m * BM, x_at])
            b = w.load([tile_n * BN, w_at]).T if TRANSPOSED else w.load([w_at, tile_n * BN])
            acc = dot(a, b, acc, UPCAST)
        if bias is not None:
            column = tile_n * BN + tl.arange(0, BN)
            acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        y.store([tile_m * BM, tile_n * BN], acc.to(y.dtype))


def _by_tile(
    x: Tensor, w: Tensor, transposed: bool, spans: Tensor, k: int, tile_rows: int, step: int, bias: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """``w`` is [N, K] if ``transposed``, else [K, N]; ``step``: what the table's entries are multiples of."""
    (m, n), arch = out.shape, architecture()
    if not (m and n):
        return
    fits = arch >= PERSISTENT.oldest and k > 0 and x.dtype is not torch.float32 and tile_rows in ROWS
    row = PERSISTENT.meta(arch, tile_rows) if fits else {"BN": 0, "BK": 1}
    bn, bk = min(row["BN"], power_of_2(n, 16)), row["BK"]
    if not fits or k % bk or step % bk or tma_reason(x, w, out) is not None:
        matmul(x, w.T if transposed else w, out, k=k, bias=bias, spans=spans, tile_rows=tile_rows)
        return
    tiles = triton.cdiv(m, tile_rows) * triton.cdiv(n, bn)
    _persistent[(min(tiles, processors(x.device)),)](
        TensorDescriptor.from_tensor(x, [tile_rows, bk]),
        TensorDescriptor.from_tensor(w, [bn, bk] if transposed else [bk, bn]),
        TensorDescriptor.from_tensor(out, [tile_rows, bn]),
        bias, spans, m, n, k // bk, TRANSPOSED=transposed, BM=tile_rows, UPCAST=UPCAST, **{**row, "BN": bn},
    )  # fmt: skip


def bordered_by_tile(
    x: Tensor, weight: Tensor, spans: Tensor, k: int, tile_rows: int, step: int, bias: Tensor | None, out: Tensor
) -> None:
    _by_tile(x, weight, True, spans, k, tile_rows, step, bias, out)


def bordered_by_tile_backward(
    dy: Tensor, weight: Tensor, spans: Tensor, n: int, tile_rows: int, step: int, out: Tensor
) -> None:
    _by_tile(dy, weight, False, spans, n, tile_rows, step, None, out)
