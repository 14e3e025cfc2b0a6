"""Device code of causal attention: a program holds a tile of queries (or keys) and passes over the keys (queries).

Scores are multiplied with ``scale`` only inside the exponential, ``p = exp2((s - max) * scale * log2 e)``: the largest
has weight 1 exactly, however large it is. P and dS are rounded to the working dtype for their second product; sums are
fp32. Tiles off the diagonal are not masked: in a sequence, tiles of queries and of keys begin at the same rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mint_engine.kernels.triton_common import dot

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(base, stride, row, end, head, column, d):
    """``[rows, D]`` of one head; rows from ``end`` on and columns from ``d`` on are 0."""
    where = base + row.to(tl.int64)[:, None] * stride + head * d + column[None, :]
    return tl.load(where, mask=(row < end)[:, None] & (column < d)[None, :], other=0.0)


@triton.jit
def _put(base, stride, row, end, head, column, d, value):
    where = base + row.to(tl.int64)[:, None] * stride + head * d + column[None, :]
    tl.store(where, value.to(base.dtype.element_ty), mask=(row < end)[:, None] & (column < d)[None, :])


@triton.jit
def _attend(
    acc, high, total, q_tile, k, k_row, v, v_row, row, key, end, head, column, d, slope,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and output after one more tile of keys."""
    keys = _rows(k, k_row, key, end, head, column, d)
    values = _rows(v, v_row, key, end, head, column, d)
    scores = dot(q_tile, tl.trans(keys), tl.zeros((BM, BN), tl.float32), UPCAST)
    if MASKED:
        scores = tl.where(key[None, :] <= row[:, None], scores, float("-inf"))
    new = tl.maximum(high, tl.max(scores, 1))
    p = tl.exp2((scores - new[:, None]) * slope)
    shrunk = tl.exp2((high - new) * slope)
    acc = dot(p.to(v.dtype.element_ty), values, acc * shrunk[:, None], UPCAST)
    return acc, new, total * shrunk + tl.sum(p, 1)


@triton.jit
def forward(
    q, q_row, k, k_row, v, v_row, o, o_row, lse, tiles, m, d, group, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Key number ``row + shift`` is the query's own: with a shift, the first tokens have keys but no queries."""
    tile, head = tl.program_id(0), tl.program_id(1)
    first, end, start = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    shift = tl.load(tiles + tile * 4 + 3)
    row, column, step = start + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    q_tile = _rows(q, q_row, row, end, head, column, d)
    high = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    slope, shared = scale * LOG2E, head // group
    own, keys_end = row + shift, end + shift
    diagonal = first + (start + shift + 1 - first) // BN * BN  # from here on some query must not see all keys of a tile
    for at in range(first, diagonal, BN):
        acc, high, total = _attend(
            acc, high, total, q_tile, k, k_row, v, v_row, own, at + step, keys_end, shared, column, d, slope,
            False, BM, BN, UPCAST,
        )  # fmt: skip
    for at in range(diagonal, min(start + BM, end) + shift, BN):
        acc, high, total = _attend(
            acc, high, total, q_tile, k, k_row, v, v_row, own, at + step, keys_end, shared, column, d, slope,
            True, BM, BN, UPCAST,
        )  # fmt: skip
    _put(o, o_row, row, end, head, column, d, acc / total[:, None])
    tl.store(lse + head * m + row, high * scale + tl.log(total), mask=row < end)


@triton.jit
def _gradient_q(
    acc, q_tile, do_tile, lse_row, delta, k, k_row, v, v_row, row, key, end, head, column, d, slope,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    keys = _rows(k, k_row, key, end, head, column, d)
    values = _rows(v, v_row, key, end, head, column, d)
    zero = tl.zeros((BM, BN), tl.float32)
    p = tl.exp2(dot(q_tile, tl.trans(keys), zero, UPCAST) * slope - lse_row[:, None])
    if MASKED:
        p = tl.where(key[None, :] <= row[:, None], p, 0.0)
    ds = p * (dot(do_tile, tl.trans(values), zero, UPCAST) - delta[:, None])
    return dot(ds.to(k.dtype.element_ty), keys, acc, UPCAST)


@triton.jit
def backward_q(
    q, q_row, k, k_row, v, v_row, do, do_row, o, o_row, lse, delta, dq, dq_row, tiles, m, d, group, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    first, end, start = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    row, column, step = start + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    q_tile = _rows(q, q_row, row, end, head, column, d)
    do_tile = _rows(do, do_row, row, end, head, column, d)
    o_tile = _rows(o, o_row, row, end, head, column, d)
    own = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    here = head * m + row
    tl.store(delta + here, own, mask=row < end)
    lse_row = tl.load(lse + here, mask=row < end, other=float("inf")) * LOG2E
    acc = tl.zeros((BM, D), tl.float32)
    slope, shared = scale * LOG2E, head // group
    for at in range(first, start, BN):
        acc = _gradient_q(
            acc, q_tile, do_tile, lse_row, own, k, k_row, v, v_row, row, at + step, end, shared, column, d, slope,
            False, BM, BN, UPCAST,
        )  # fmt: skip
    for at in range(start, min(start + BM, end), BN):
        acc = _gradient_q(
            acc, q_tile, do_tile, lse_row, own, k, k_row, v, v_row, row, at + step, end, shared, column, d, slope,
            True, BM, BN, UPCAST,
        )  # fmt: skip
    _put(dq, dq_row, row, end, head, column, d, acc * scale)


@triton.jit
def backward_kv(
    q, q_row, k, k_row, v, v_row, do, do_row, lse, delta, dk, dk_row, dv, dv_row, tiles, m, d, group, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All products transposed, ``[keys, queries]``. One loop over the group's heads and their tiles of queries, masked
    throughout: two loops, as in the other kernels, need more registers than there are."""
    tile, shared = tl.program_id(0), tl.program_id(1)
    end, start = tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    key, column = start + tl.arange(0, BN), tl.arange(0, D)
    k_tile = _rows(k, k_row, key, end, shared, column, d)
    v_tile = _rows(v, v_row, key, end, shared, column, d)
    dk_acc = tl.zeros((BN, D), tl.float32)
    dv_acc = tl.zeros((BN, D), tl.float32)
    slope, zero = scale * LOG2E, tl.zeros((BN, BM), tl.float32)
    steps = tl.cdiv(end - start, BM)
    for i in range(group * steps):
        head, row = shared * group + i // steps, start + i % steps * BM + tl.arange(0, BM)
        queries = _rows(q, q_row, row, end, head, column, d)
        outs = _rows(do, do_row, row, end, head, column, d)
        here = head * m + row
        lse_row = tl.load(lse + here, mask=row < end, other=float("inf")) * LOG2E  # past the end: p = 0
        own = tl.load(delta + here, mask=row < end, other=0.0)
        p = tl.exp2(dot(k_tile, tl.trans(queries), zero, UPCAST) * slope - lse_row[None, :])
        p = tl.where(key[:, None] <= row[None, :], p, 0.0)
        dv_acc = dot(p.to(do.dtype.element_ty), outs, dv_acc, UPCAST)
        ds = p * (dot(v_tile, tl.trans(outs), zero, UPCAST) - own[None, :])
        dk_acc = dot(ds.to(q.dtype.element_ty), queries, dk_acc, UPCAST)
    _put(dk, dk_row, key, end, shared, column, d, dk_acc * scale)
    _put(dv, dv_row, key, end, shared, column, d, dv_acc)
