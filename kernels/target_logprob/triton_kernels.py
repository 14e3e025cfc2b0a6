"""Device code of target_logprob: tiles of logits in registers, and what becomes of them.

A tile is ``BM`` rows by ``BN`` tokens of the vocabulary. ``top`` and ``total`` are ``[tiles, M]`` fp32: the maximum of
a row's tile and its sum of ``exp(logit - maximum)``. ``kept`` is ``exp(logit - maximum)`` itself, in the working
dtype. Targets come as a matrix, or (``bounds`` not None) as the labels of a packed batch, of which a row takes the
one ``shift`` places further on in its own sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mint_engine.kernels.triton_common import dot, product, product_tma, tile_of


@triton.jit
def _target(targets, n_targets, j, bounds, halvings, sequences, places, shift, row, inside):
    """Target j of each row, -1 where there is none. ``row`` is int64."""
    if bounds is None:
        target = tl.load(targets + row * n_targets + j, mask=inside, other=-1)
    else:
        place = row
        if places is not None:
            place = tl.load(places + row, mask=inside, other=0)
        low = place * 0  # the row's sequence: the first that ends behind it, by bisection
        high = low + sequences - 1
        for _ in range(halvings):
            middle = (low + high) // 2
            beyond = tl.load(bounds + middle + 1) <= place
            high = tl.where(beyond, high, middle)
            low = tl.where(beyond & (low < high), middle + 1, low)
        at = place + shift
        target = tl.load(targets + at, mask=inside & (at < tl.load(bounds + low + 1)), other=-1)
    return target


@triton.jit
def _logits(
    x, x_row, w, w_row, tile_m, tile_n, m, v, h, tiles,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """fp32 ``[BM, BN]``. x and w are descriptors if TMA, else pointers."""
    if TMA:
        logits = product_tma(x, w, tile_m, tile_n, tiles, BM, BN, BK, UPCAST)
    else:
        row, column = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
        logits = product(x, x_row, w, w_row, row, column, m, v, h, tiles, BM, BN, BK, UPCAST)
    return logits


@triton.jit
def tile(
    x, x_row, w, w_row, targets, n_targets, bounds, halvings, sequences, places, shift,
    top, total, picked, kept, kept_row, m, v, h,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.cdiv(m, BM), tl.cdiv(v, BN), GROUP)
    row, column = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    logits = _logits(x, x_row, w, w_row, tile_m, tile_n, m, v, h, tl.cdiv(h, BK), TMA, BM, BN, BK, UPCAST)
    logits = tl.where((column < v)[None, :], logits, float("-inf"))
    inside = row < m
    row = row.to(tl.int64)

    for j in range(n_targets):
        target = _target(targets, n_targets, j, bounds, halvings, sequences, places, shift, row, inside)
        value = tl.sum(tl.where(target[:, None] == column[None, :], logits, 0.0), 1)
        mine = inside & (target // BN == tile_n) & (target >= 0) & (target < v)
        tl.store(picked + row * n_targets + j, value, mask=mine)
    high = tl.max(logits, 1)
    base = tl.where(high == float("-inf"), 0.0, high)  # a tile of impossible tokens: 0, not NaN
    here = tile_n.to(tl.int64) * m + row
    scaled = tl.exp(logits - base[:, None])
    tl.store(top + here, high, mask=inside)
    tl.store(total + here, tl.sum(scaled, 1), mask=inside)
    if kept is not None:
        mask = inside[:, None] & (column < v)[None, :]
        tl.store(kept + row[:, None] * kept_row + column[None, :], scaled.to(kept.dtype.element_ty), mask=mask)


@triton.jit
def merge(
    top, total, picked, targets, n_targets, bounds, halvings, sequences, places, shift, logprob, lse, m, tiles,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row's tiles into its log-sum-exp, ``TILES`` at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < m
    row = row.to(tl.int64)
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tiles, TILES):
        step = first + tl.arange(0, TILES)
        here = step.to(tl.int64)[:, None] * m + row[None, :]
        mask = (step < tiles)[:, None] & inside[None, :]
        highs = tl.load(top + here, mask=mask, other=float("-inf"))
        parts = tl.load(total + here, mask=mask, other=0.0)
        new = tl.maximum(high, tl.max(highs, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(high - base) + tl.sum(parts * tl.exp(highs - base[None, :]), 0)
        high = new
    result = high + tl.log(sums)
    tl.store(lse + row, result, mask=inside)
    for j in range(n_targets):
        target = _target(targets, n_targets, j, bounds, halvings, sequences, places, shift, row, inside)
        value = tl.load(picked + row * n_targets + j, mask=inside, other=0.0)
        tl.store(logprob + row * n_targets + j, tl.where(target == -1, 0.0, value - result), mask=inside)


@triton.jit
def rebuild(
    kept, kept_row, top, lse, logprob, dlogprob, targets, n_targets, bounds, halvings, sequences, places, shift,
    tail, tail_row, dborder, dborder_row, m, v, border,
    BORDERED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``kept`` becomes dlogits in place, and ``dborder += dlogits.T @ tail``: one pass, a program a tile of tokens."""
    tile_n = tl.program_id(0)
    column, across = tile_n * BN + tl.arange(0, BN), tl.arange(0, P)
    acc = tl.zeros((BN, P), tl.float32)
    for start in range(0, m, BM):
        row = start + tl.arange(0, BM)
        inside = row < m
        row = row.to(tl.int64)
        mask = inside[:, None] & (column < v)[None, :]
        where = kept + row[:, None] * kept_row + column[None, :]
        weight = tl.zeros((BM,), tl.float32)
        for j in range(n_targets):
            target = _target(targets, n_targets, j, bounds, halvings, sequences, places, shift, row, inside)
            share = tl.load(dlogprob + row * n_targets + j, mask=inside, other=0.0)
            weight += tl.where(target == -1, 0.0, share)
        high = tl.load(top + tile_n.to(tl.int64) * m + row, mask=inside, other=float("-inf"))
        factor = -weight * tl.exp(high - tl.load(lse + row, mask=inside, other=0.0))
        d = tl.load(where, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        for j in range(n_targets):  # at a target p is known in fp32
            target = _target(targets, n_targets, j, bounds, halvings, sequences, places, shift, row, inside)
            p = tl.exp(tl.load(logprob + row * n_targets + j, mask=inside, other=0.0))
            d = tl.where(target[:, None] == column[None, :], (-weight * p)[:, None], d)
        for j in range(n_targets):
            target = _target(targets, n_targets, j, bounds, halvings, sequences, places, shift, row, inside)
            share = tl.load(dlogprob + row * n_targets + j, mask=inside, other=0.0)
            d += tl.where(target[:, None] == column[None, :], share[:, None], 0.0)
        d = tl.where(weight[:, None] == 0.0, 0.0, d)  # whatever lse is; NaN is a gradient
        rounded = d.to(kept.dtype.element_ty)
        tl.store(where, rounded, mask=mask)
        if BORDERED:
            s = tl.load(
                tail + row[:, None] * tail_row + across[None, :],
                mask=inside[:, None] & (across < border)[None, :], other=0.0,
            )  # fmt: skip
            acc = dot(tl.trans(rounded), s, acc, UPCAST)
    if BORDERED:
        where = dborder + column.to(tl.int64)[:, None] * dborder_row + across[None, :]
        mask = (column < v)[:, None] & (across < border)[None, :]
        tl.store(where, tl.load(where, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit
def dlogits(
    x, x_row, w, w_row, targets, n_targets, bounds, halvings, sequences, places, shift, dlogprob, lse, out, out_row,
    m, v, h,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The logits again, turned into dlogits; a tile of rows without a gradient skips its product."""
    tile_m, tile_n = tile_of(tl.cdiv(m, BM), tl.cdiv(v, BN), GROUP)
    row, column = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    inside, at = row < m, row.to(tl.int64)
    weight = tl.zeros((BM,), tl.float32)
    for j in range(n_targets):
        target = _target(targets, n_targets, j, bounds, halvings, sequences, places, shift, at, inside)
        share = tl.load(dlogprob + at * n_targets + j, mask=inside, other=0.0)
        weight += tl.where(target == -1, 0.0, share)
    # NaN counts as a gradient: it must not be lost.
    tiles = tl.where(tl.sum((weight != 0.0).to(tl.int32), 0) > 0, tl.cdiv(h, BK), 0)
    logits = _logits(x, x_row, w, w_row, tile_m, tile_n, m, v, h, tiles, TMA, BM, BN, BK, UPCAST)
    d = -weight[:, None] * tl.exp(logits - tl.load(lse + at, mask=inside, other=0.0)[:, None])
    d = tl.where(weight[:, None] == 0.0, 0.0, d)  # not 0 * inf: the skipped logits are 0, whatever lse is
    for j in range(n_targets):
        target = _target(targets, n_targets, j, bounds, halvings, sequences, places, shift, at, inside)
        share = tl.load(dlogprob + at * n_targets + j, mask=inside, other=0.0)
        d += tl.where(target[:, None] == column[None, :], share[:, None], 0.0)
    mask = inside[:, None] & (column < v)[None, :]
    tl.store(out + at[:, None] * out_row + column[None, :], d.to(out.dtype.element_ty), mask=mask)
