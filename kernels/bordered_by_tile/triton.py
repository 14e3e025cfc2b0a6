"""Many adapters in one Triton GEMM: its last tiles of K are the tile of rows' own border, looked up in a table.

A pass with many adapters does the work of a pass with one. From Hopper on, tiles arrive by TMA, which cannot mask
inside a matrix. Where spans are multiples of the tile of K, the border is more steps of the same loop, and a program
works through many tiles of y (persistent): the loads of the next start while the last is stored. Else the border is a
loop of its own, in steps of 16 columns. What TMA cannot take at all (odd strides) and older GPUs go through plain
pointers, with the GEMM of `bordered_linear/triton.py`.
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
    tile_of,
    tma_reason,
    triton_reason,
)

WHOLE = 64  # what spans are multiples of, where the border is whole tiles of K
ROWS = (16, 32, 64, 128, 256)  # a program's rows: those of a tile of the table


def _shared(row: Row, tile_rows: int) -> int:
    return 2 * (row["stages"] * row["BK"] * (tile_rows + row["BN"]) + tile_rows * row["BN"])


PERSISTENT = Tunable(
    "bordered_by_tile.persistent",
    {"BN": (64, 128, 256), "BK": (WHOLE,), "GROUP": (4, 8, 16), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=ROWS, shared=_shared, oldest=90,
)  # fmt: skip

TWO_LOOPS = Tunable(
    "bordered_by_tile.two_loops",
    {"BN": (64, 128, 256), "BK": (64, 128), "GROUP": (4, 8, 16), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=ROWS, shared=_shared, oldest=90,
)  # fmt: skip
STEP = 16  # columns of the border at a time, where there are two loops


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


@triton.jit
def _two_loops(
    x, w, x_border, w_border, y, bias, spans, m, n, base,
    TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``x_border`` and ``w_border`` describe the same matrices as x and w, with STEP columns a tile."""
    tile_m, tile_n = tile_of(tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP)
    source, border = tl.load(spans + tile_m * 3), tl.load(spans + tile_m * 3 + 1)
    width = tl.load(spans + tile_m * 3 + 2)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(base):
        a = x.load([tile_m * BM, i * BK])
        b = w.load([tile_n * BN, i * BK]).T if TRANSPOSED else w.load([i * BK, tile_n * BN])
        acc = dot(a, b, acc, UPCAST)
    for at in range(0, width, STEP):
        a, k = x_border.load([tile_m * BM, source + at]), border + at
        b = w_border.load([tile_n * BN, k]).T if TRANSPOSED else w_border.load([k, tile_n * BN])
        acc = dot(a, b, acc, UPCAST)
    if bias is not None:
        column = tile_n * BN + tl.arange(0, BN)
        acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    y.store([tile_m * BM, tile_n * BN], acc.to(y.dtype))


def _tiles_of(w: Tensor, bn: int, bk: int, transposed: bool) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(w, [bn, bk] if transposed else [bk, bn])


def _by_tile(
    x: Tensor, w: Tensor, transposed: bool, spans: Tensor, k: int, tile_rows: int, step: int, bias: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """``w`` is [N, K] if ``transposed``, else [K, N]; ``step``: what the table's entries are multiples of."""
    (m, n), arch = out.shape, architecture()
    if not (m and n):
        return
    by_tma = arch >= 90 and k > 0 and x.dtype is not torch.float32 and tile_rows in ROWS
    kernel = TWO_LOOPS if step % WHOLE else PERSISTENT
    row = kernel.meta(arch, tile_rows) if by_tma else {"BN": 1, "BK": 1}
    row["BN"] = bn = min(row["BN"], power_of_2(n, 16))
    bk = row["BK"]
    if not by_tma or k % bk or tma_reason(x, w, out) is not None:
        matmul(x, w.T if transposed else w, out, k=k, bias=bias, spans=spans, tile_rows=tile_rows)
        return
    tiles = triton.cdiv(m, tile_rows) * triton.cdiv(n, bn)
    matrices = TensorDescriptor.from_tensor(x, [tile_rows, bk]), _tiles_of(w, bn, bk, transposed)
    y = TensorDescriptor.from_tensor(out, [tile_rows, bn])
    rest = {"TRANSPOSED": transposed, "BM": tile_rows, "UPCAST": UPCAST, **row}
    if kernel is PERSISTENT:
        _persistent[(min(tiles, processors(x.device)),)](*matrices, y, bias, spans, m, n, k // bk, **rest)
        return
    borders = TensorDescriptor.from_tensor(x, [tile_rows, STEP]), _tiles_of(w, bn, STEP, transposed)
    _two_loops[(tiles,)](*matrices, *borders, y, bias, spans, m, n, k // bk, STEP=STEP, **rest)


def bordered_by_tile(
    x: Tensor, weight: Tensor, spans: Tensor, k: int, tile_rows: int, step: int, bias: Tensor | None, out: Tensor
) -> None:
    _by_tile(x, weight, True, spans, k, tile_rows, step, bias, out)


def bordered_by_tile_backward(
    dy: Tensor, weight: Tensor, spans: Tensor, n: int, tile_rows: int, step: int, out: Tensor
) -> None:
    _by_tile(dy, weight, False, spans, n, tile_rows, step, None, out)
