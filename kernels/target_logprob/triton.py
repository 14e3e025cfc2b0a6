"""Fused unembedding + log-softmax in Triton: a GEMM over the vocabulary whose epilogue keeps a few numbers of a row.

Forward: a program owns a tile of logits in fp32 registers and leaves, for each of its rows, the maximum, the sum of
exponentials and the logits of the targets that fall into it. A second kernel merges the tiles of a row.
Backward: the same tiles again, turned into dlogits; a chunk of rows of them, rounded, goes to scratch, from where the
library makes dx and `outer_accumulate` the border's gradient. A tile of rows without a gradient skips its product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.bordered_linear.triton import matmul
from mint_engine.kernels.outer_accumulate.triton import outer_accumulate
from mint_engine.kernels.triton_common import GROUP, UPCAST, power_of_2, product, stages, tile_of
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401

SCRATCH_BYTES = 512 << 20  # dlogits held at once in the backward
BN, BK = 128, 64
MERGED_ROWS, MERGED_TILES = 16, 64  # of one step of the merge


@triton.jit
def _tile(
    x, x_row, w, w_row, targets, n_targets, top, total, picked, m, v, h,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.cdiv(m, BM), tl.cdiv(v, BN), GROUP)
    row, column = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    logits = product(x, x_row, w, w_row, row, column, m, v, h, tl.cdiv(h, BK), BM, BN, BK, UPCAST)
    logits = tl.where((column < v)[None, :], logits, float("-inf"))
    inside = row < m
    row = row.to(tl.int64)

    high = tl.max(logits, 1)
    base = tl.where(high == float("-inf"), 0.0, high)  # a tile of impossible tokens: 0, not NaN
    here = tile_n.to(tl.int64) * m + row
    tl.store(top + here, high, mask=inside)
    tl.store(total + here, tl.sum(tl.exp(logits - base[:, None]), 1), mask=inside)
    for j in range(n_targets):
        target = tl.load(targets + row * n_targets + j, mask=inside, other=-1)
        value = tl.sum(tl.where(target[:, None] == column[None, :], logits, 0.0), 1)
        mine = inside & (target // BN == tile_n) & (target >= 0) & (target < v)
        tl.store(picked + row * n_targets + j, value, mask=mine)


@triton.jit
def _merge(
    top, total, picked, targets, n_targets, logprob, lse, m, tiles, ROWS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < m
    row = row.to(tl.int64)
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        here = tile.to(tl.int64)[:, None] * m + row[None, :]
        mask = (tile < tiles)[:, None] & inside[None, :]
        highs = tl.load(top + here, mask=mask, other=float("-inf"))
        parts = tl.load(total + here, mask=mask, other=0.0)
        new = tl.maximum(high, tl.max(highs, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(high - base) + tl.sum(parts * tl.exp(highs - base[None, :]), 0)
        high = new
    result = high + tl.log(sums)
    tl.store(lse + row, result, mask=inside)
    for j in range(n_targets):
        target = tl.load(targets + row * n_targets + j, mask=inside, other=-1)
        value = tl.load(picked + row * n_targets + j, mask=inside, other=0.0)
        tl.store(logprob + row * n_targets + j, tl.where(target == -1, 0.0, value - result), mask=inside)


@triton.jit
def _dlogits(
    x, x_row, w, w_row, targets, n_targets, dlogprob, lse, out, out_row, m, v, h,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.cdiv(m, BM), tl.cdiv(v, BN), GROUP)
    row, column = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    inside, at = row < m, row.to(tl.int64)
    weight = tl.zeros((BM,), tl.float32)
    for j in range(n_targets):
        weight += tl.load(dlogprob + at * n_targets + j, mask=inside, other=0.0)
    # NaN counts as a gradient: it must not be lost.
    tiles = tl.where(tl.sum((weight != 0.0).to(tl.int32), 0) > 0, tl.cdiv(h, BK), 0)
    logits = product(x, x_row, w, w_row, row, column, m, v, h, tiles, BM, BN, BK, UPCAST)
    d = -weight[:, None] * tl.exp(logits - tl.load(lse + at, mask=inside, other=0.0)[:, None])
    d = tl.where(weight[:, None] == 0.0, 0.0, d)  # not 0 * inf: the skipped logits are 0, whatever lse is
    for j in range(n_targets):
        target = tl.load(targets + at * n_targets + j, mask=inside, other=-1)
        share = tl.load(dlogprob + at * n_targets + j, mask=inside, other=0.0)
        d += tl.where(target[:, None] == column[None, :], share[:, None], 0.0)
    mask = inside[:, None] & (column < v)[None, :]
    tl.store(out + at[:, None] * out_row + column[None, :], d.to(out.dtype.element_ty), mask=mask)


def _geometry(m: int, v: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, int | bool]]:
    bm = min(128, power_of_2(m, 16))
    tile = {"BM": bm, "BN": BN, "BK": BK, "GROUP": GROUP, "UPCAST": UPCAST}
    grid = (triton.cdiv(m, bm) * triton.cdiv(v, BN),)
    return grid, {**tile, "num_warps": 8 if bm == 128 else 4, "num_stages": stages(dtype)}


def logits(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    return matmul(x, weight.T, out)


def target_logprob(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    (m, h), v, k = x.shape, weight.shape[0], targets.shape[1]
    targets, tiles = targets.contiguous(), triton.cdiv(v, BN)
    logprob, lse, top, total = (
        torch.empty(shape, dtype=torch.float32, device=x.device) for shape in ((m, k), (m,), (tiles, m), (tiles, m))
    )
    # No tile holds a target outside the vocabulary: its logprob stays NaN.
    picked = torch.full((m, k), float("nan"), dtype=torch.float32, device=x.device)
    if m and v:
        grid, meta = _geometry(m, v, x.dtype)
        _tile[grid](
            x, x.stride(0), weight, weight.stride(0), targets, k, top, total, picked, m, v, h, **meta
        )  # fmt: skip
        _merge[(triton.cdiv(m, MERGED_ROWS),)](
            top, total, picked, targets, k, logprob, lse, m, tiles, ROWS=MERGED_ROWS, TILES=MERGED_TILES, num_warps=4
        )
    return logprob, lse


def target_logprob_backward(
    x: Tensor, weight: Tensor, targets: Tensor, dlogprob: Tensor, lse: Tensor, border: int, spans: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``spans`` saves nothing here: what lies outside of them is zero."""
    (m, h), v, k = x.shape, weight.shape[0], targets.shape[1]
    dx = torch.empty((m, h), dtype=x.dtype, device=x.device)
    dborder = torch.zeros((v, border), dtype=torch.float32, device=x.device)
    targets, dlogprob, lse = targets.contiguous(), dlogprob.contiguous(), lse.contiguous()
    chunk = min(m, max(1, SCRATCH_BYTES // (x.element_size() * v * 128)) * 128)
    scratch = torch.empty((chunk, v), dtype=x.dtype, device=x.device)
    for start in range(0, m, max(chunk, 1)):
        rows = slice(start, min(start + chunk, m))
        part, dlogits = x[rows], scratch[: rows.stop - start]
        grid, meta = _geometry(len(part), v, x.dtype)
        _dlogits[grid](
            part, x.stride(0), weight, weight.stride(0), targets[rows], k, dlogprob[rows], lse[rows],
            dlogits, dlogits.stride(0), len(part), v, h, **meta,
        )  # fmt: skip
        torch.mm(dlogits, weight, out=dx[rows])
        outer_accumulate(dlogits, part[:, h - border :], dborder, 1.0)
    return dx, dborder
