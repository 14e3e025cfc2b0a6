"""Unembedding and draw in Triton: the inverse of the cumulative sum in two stages over the vocabulary.

First a GEMM whose epilogue keeps of each tile of logits only its maximum and its sum of exponentials, row by row. Then
a program for each row finds the tile in which the cumulative sum passes the uniform number, makes that tile's logits
again, in the same shapes and so to the same bits, and finds the token in it. Sums of tiles are joined in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.sample_rows.triton import NEVER, divisor_of
from mint_engine.kernels.triton_common import UPCAST, architecture, power_of_2, product, tile_of
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401


def _shared(row: Row, _: int) -> int:
    return 2 * row["stages"] * row["BK"] * (row["BM"] + row["BN"])


TILE = Tunable(
    "sample_head.tile",
    {"BM": (16, 32, 64), "BN": (64, 128), "BK": (64, 128), "GROUP": (4, 8), "warps": (4, 8), "stages": (2, 3, 4)},
    shared=_shared,
)
TILES = 1024  # tiles of a row looked at together


@triton.jit
def _sums(
    x, x_row, w, w_row, temperatures, highs, totals, m, n, k, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``highs``, ``totals`` fp32 [m, tiles]: the largest logit of a tile, the sum of exponentials relative to it."""
    tile_m, tile_n = tile_of(tl.cdiv(m, BM), tiles, GROUP)
    row, column = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    z = product(x, x_row, w, w_row, row, column, m, n, k, tl.cdiv(k, BK), BM, BN, BK, UPCAST)
    z = tl.where((column < n)[None, :], z, float("-inf"))
    high = tl.max(z, 1)
    divisor = divisor_of(tl.load(temperatures + row, mask=row < m, other=1.0))
    shift = tl.where(high == float("-inf"), 0.0, high)
    e = tl.exp(tl.div_rn(z - shift[:, None], tl.broadcast_to(divisor[:, None], (BM, BN))))
    at = row.to(tl.int64) * tiles + tile_n
    tl.store(highs + at, high, mask=row < m)
    tl.store(totals + at, tl.sum(e, 1), mask=row < m)


@triton.jit
def _masses(highs, totals, at, tile, tiles, high, divisor):
    """What tiles weigh, float64, relative to the row's largest logit; 0 past the last."""
    own = tl.load(highs + at + tile, mask=tile < tiles, other=float("-inf"))
    total = tl.load(totals + at + tile, mask=tile < tiles, other=0.0)
    scale = tl.where(tile < tiles, tl.exp(tl.div_rn(own - high, divisor)), 0.0)
    return own, total.to(tl.float64) * scale.to(tl.float64)


@triton.jit
def _pick(
    x, x_row, w, w_row, temperatures, uniforms, highs, totals, tokens, logprobs, m, n, k, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    own_row, step = tl.program_id(0), tl.arange(0, TILES)
    temperature = tl.load(temperatures + own_row)
    greedy, divisor = temperature == 0.0, divisor_of(temperature)
    at = own_row.to(tl.int64) * tiles
    high = float("-inf")
    for i in range(0, tiles, TILES):
        high = tl.maximum(high, tl.max(tl.load(highs + at + i + step, mask=i + step < tiles, other=float("-inf")), 0))
    total = tl.full((), 0.0, tl.float64)
    for i in range(0, tiles, TILES):
        largest, mass = _masses(highs, totals, at, i + step, tiles, high, divisor)
        total += tl.sum(mass, 0)
    target = tl.load(uniforms + own_row) * total
    # The tile with the token; rounding may leave none: then the last of any mass.
    running = tl.full((), 0.0, tl.float64)
    found = tl.full((), 0, tl.int32)
    chosen, before = found, running
    for i in range(0, tiles, TILES):
        tile = i + step
        largest, mass = _masses(highs, totals, at, tile, tiles, high, divisor)
        above = (running + tl.cumsum(mass, 0) > target) & (mass > 0.0)
        hit = tl.where(greedy, (largest == high) & (tile < tiles), above)
        first = tl.min(tl.where(hit, tile, NEVER), 0)
        here = tl.where(first == NEVER, tl.max(tl.where(mass > 0.0, tile, -1), 0), first)
        takes = (found == 0) & (here >= 0)
        chosen = tl.where(takes, here, chosen)
        before = tl.where(takes, running + tl.sum(tl.where(tile < here, mass, 0.0), 0), before)
        found = tl.where(first == NEVER, found, 1)
        running += tl.sum(mass, 0)
    row, column = own_row // BM * BM + tl.arange(0, BM), chosen * BN + tl.arange(0, BN)
    z = product(x, x_row, w, w_row, row, column, m, n, k, tl.cdiv(k, BK), BM, BN, BK, UPCAST)
    z = tl.sum(tl.where((row == own_row)[:, None], z, 0.0), 0)
    z = tl.where(column < n, z, float("-inf"))
    e = tl.exp(tl.div_rn(z - high, divisor))
    above = (before + tl.cumsum(e.to(tl.float64), 0) > target) & (e > 0.0)
    token = tl.min(tl.where(tl.where(greedy, z == high, above), column, NEVER), 0)
    token = tl.where(token == NEVER, tl.max(tl.where(e > 0.0, column, 0), 0), token)
    picked = tl.sum(tl.where(column == token, z, 0.0), 0)
    valid = total == total
    logprob = tl.div_rn(picked - high, divisor).to(tl.float64) - tl.log(total)
    tl.store(tokens + own_row, tl.where(valid, token, 0).to(tl.int64))
    tl.store(logprobs + own_row, tl.where(valid, logprob, float("nan")).to(tl.float32))


def sample_head(x: Tensor, weight: Tensor, temperature: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    (m, k), n = x.shape, len(weight)
    tokens = torch.empty(m, dtype=torch.int64, device=x.device)
    logprobs = torch.empty(m, dtype=torch.float32, device=x.device)
    if not m:
        return tokens, logprobs
    meta = TILE.meta(architecture())
    meta["BM"] = min(meta["BM"], power_of_2(m, 16))
    if x.dtype is torch.float32:  # for tests: twice as wide
        meta["num_stages"] = 2
    tiles = triton.cdiv(n, meta["BN"])
    highs, totals = torch.empty((2, m, tiles), dtype=torch.float32, device=x.device)
    temperature, uniforms = temperature.contiguous(), uniforms.contiguous()
    matrices = x, x.stride(0), weight, weight.stride(0)
    _sums[(triton.cdiv(m, meta["BM"]) * tiles,)](
        *matrices, temperature, highs, totals, m, n, k, tiles, UPCAST=UPCAST, **meta
    )
    del meta["GROUP"]
    _pick[(m,)](
        *matrices, temperature, uniforms, highs, totals, tokens, logprobs, m, n, k, tiles, UPCAST=UPCAST,
        TILES=min(TILES, power_of_2(tiles)), **meta,
    )  # fmt: skip
    return tokens, logprobs
