"""The adapter's gradients in Triton: dY is read once for dS and dB, X once for dA.

A program owns a tile of dY's rows and a part of its columns: it sums dS over the columns in registers and leaves dB of
its rows. What programs leave is scratch, which a second kernel adds up in order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.bordered_linear.triton import expand_backward
from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.outer_accumulate.triton import outer_accumulate
from mint_engine.kernels.triton_common import UPCAST, architecture, dot, power_of_2, processors
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401

WIDEST = 64  # ranks of a module that fit beside the tiles; more go through the kernels of the parts


def _shared(row: Row, rank: int) -> int:
    return 2 * row["stages"] * row["BN"] * (row["BM"] + rank) + 2 * row["BM"] * rank


PASS = Tunable(
    "lora_gradients.pass", {"BM": (64, 128, 256), "BN": (64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=(16, 32, 64), shared=_shared,
)  # fmt: skip
ADD = Tunable("lora_gradients.add", {"BLOCK": (256, 512, 1024), "warps": (4, 8), "stages": (1,)})


@triton.jit
def _pass(
    dy, dy_row, s, s_row, b, b_row, ds_parts, db_parts, m, n, r, part,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``ds_parts [parts of columns, M, r]`` and ``db_parts [tiles of rows, N, r]``, fp32."""
    tile, side = tl.program_id(0), tl.program_id(1)
    row, rank = tile * BM + tl.arange(0, BM), tl.arange(0, R)
    inside, ranks = row < m, rank < r
    at = row.to(tl.int64)[:, None]
    s_tile = tl.load(s + at * s_row + rank[None, :], mask=inside[:, None] & ranks[None, :], other=0.0)
    acc = tl.zeros((BM, R), tl.float32)
    for start in range(side * part, min(side * part + part, n), BN):
        column = start + tl.arange(0, BN)
        known = column < n
        tile_dy = tl.load(dy + at * dy_row + column[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        where = column.to(tl.int64)[:, None]
        tile_b = tl.load(b + where * b_row + rank[None, :], mask=known[:, None] & ranks[None, :], other=0.0)
        acc = dot(tile_dy, tile_b, acc, UPCAST)
        db = dot(tl.trans(tile_dy), s_tile, tl.zeros((BN, R), tl.float32), UPCAST)
        place = db_parts + (tile.to(tl.int64) * n + where) * r + rank[None, :]
        tl.store(place, db, mask=known[:, None] & ranks[None, :])
    place = ds_parts + (side.to(tl.int64) * m + at) * r + rank[None, :]
    tl.store(place, acc, mask=inside[:, None] & ranks[None, :])


@triton.jit
def _total(block, parts, count, out, out_row, elements, r, scale, START: tl.constexpr, BLOCK: tl.constexpr):
    """``out [.., r] = scale * sum of parts [count, .., r]`` in order, on top of what is there if START."""
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        total += tl.load(parts + at, mask=inside, other=0.0)
        parts += elements
    total *= scale
    where = out + at // r * out_row + at % r
    if START:
        total += tl.load(where, mask=inside, other=0.0)
    tl.store(where, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add(
    ds_parts, sides, ds, ds_row, ds_elements, ds_blocks, db_parts, tiles, db, db_row, db_elements, r, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What programs left, summed: ``ds``, then on top of what is there ``db``."""
    block = tl.program_id(0)
    if block < ds_blocks:
        _total(block, ds_parts, sides, ds, ds_row, ds_elements, r, scale, False, BLOCK)
    else:
        _total(block - ds_blocks, db_parts, tiles, db, db_row, db_elements, r, 1.0, True, BLOCK)


def _module(dy: Tensor, s: Tensor, b: Tensor, scale: float, ds: Tensor, db: Tensor) -> None:
    (m, n), r = dy.shape, b.shape[1]
    if not (m and n and r):
        ds.zero_()
        return
    if r > WIDEST:
        expand_backward(dy, b, scale, ds)
        outer_accumulate(dy, s, db, 1.0)
        return
    meta = PASS.meta(architecture(), power_of_2(r, 16))
    meta["BM"] = min(meta["BM"], power_of_2(m, 16))
    if dy.dtype is torch.float32:  # for tests: twice as wide
        meta["num_stages"], meta["BM"] = 2, min(meta["BM"], 64)
    tiles = triton.cdiv(m, meta["BM"])
    # Parts of columns: enough programs for every multiprocessor, each with more than one step to load ahead.
    parts = max(1, min(4 * processors(dy.device) // tiles, n // (4 * meta["BN"])))
    part = triton.cdiv(triton.cdiv(n, parts), meta["BN"]) * meta["BN"]
    parts = triton.cdiv(n, part)
    ds_parts = torch.empty((parts, m, r), dtype=torch.float32, device=dy.device)
    db_parts = torch.empty((tiles, n, r), dtype=torch.float32, device=dy.device)
    _pass[(tiles, parts)](
        dy, dy.stride(0), s, s.stride(0), b, b.stride(0), ds_parts, db_parts, m, n, r, part, R=power_of_2(r, 16),
        UPCAST=UPCAST, **meta,
    )  # fmt: skip
    meta = ADD.meta(architecture())
    ds_blocks, db_blocks = (triton.cdiv(t.numel(), meta["BLOCK"]) for t in (ds, db))
    _add[(ds_blocks + db_blocks,)](
        ds_parts, parts, ds, ds.stride(0), ds.numel(), ds_blocks, db_parts, tiles, db, db.stride(0), db.numel(), r,
        float(scale), **meta,
    )  # fmt: skip


def lora_gradients(
    dy: Tensor,
    s: Tensor,
    b: Sequence[Tensor],
    scale: float,
    ds: Tensor,
    db: Sequence[Tensor],
    x: Tensor | None,
    da: Tensor | None,
) -> None:
    row, r = 0, b[0].shape[1]
    for j, (b_j, db_j) in enumerate(zip(b, db, strict=True)):
        columns = slice(j * r, (j + 1) * r)
        _module(dy[:, row : row + len(b_j)], s[:, columns], b_j, scale, ds[:, columns], db_j)
        row += len(b_j)
    if x is not None and da is not None:
        outer_accumulate(ds, x, da, 1.0)
