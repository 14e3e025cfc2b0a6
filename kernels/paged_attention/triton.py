"""Decode attention over a paged cache in Triton: split over the keys (flash-decoding), then merged.

A program reads a kv head's keys and values once for its whole group of query heads (padded to the 16 rows a product
needs), KEYS of them: splits begin at the same positions in every row, so a row's sums are the same in any company and
however wide the table is. What a split leaves (maximum, sum, output, fp32) a second kernel merges in tiles of PARTS.
Lengths and blocks stay on the device and nothing waits for them: where they are out of range the row is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.triton_common import INTERPRETED, UPCAST, architecture, dot, power_of_2, triton_reason

LOG2E = tl.constexpr(1.4426950408889634)


def _shared(row: Row, d: int) -> int:
    return 2 * d * (16 + 2 * row["stages"] * row["BN"])


SPLIT = Tunable(
    "paged_attention.split",
    {"KEYS": (128, 256, 512), "BN": (32, 64, 128), "warps": (2, 4, 8), "stages": (1, 2, 3, 4)},
    cases=(64, 128, 256), shared=_shared,
)  # fmt: skip
MERGE = Tunable("paged_attention.merge", {"PARTS": (4, 8, 16), "warps": (1, 2, 4), "stages": (1,)})


def supports(*tensors: Tensor | None) -> str | None:
    """Why this face cannot run on these tensors, or None."""
    return triton_reason(*tensors)


@triton.jit
def _split(
    q, q_row, k, k_block, k_token, v, v_block, v_token, table, table_row, lengths, outputs, highs, totals,
    blocks, block, width, group, d, slope,
    KEYS: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, shared, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = min(tl.load(lengths + row), width * block)
    first = part * KEYS
    if first >= length:
        return
    own, column, step = tl.arange(0, G), tl.arange(0, D), tl.arange(0, BN)
    inside = (column < d)[None, :]
    heads = shared * group + own
    q_tile = tl.load(q + row * q_row + (heads * d)[:, None] + column[None, :],
                     mask=(own < group)[:, None] & inside, other=0.0)  # fmt: skip
    high = tl.full((G,), float("-inf"), tl.float32)
    total = tl.zeros((G,), tl.float32)
    acc = tl.zeros((G, D), tl.float32)
    for at in range(first, min(first + KEYS, length), BN):
        key = at + step
        cell = tl.load(table + row * table_row + key // block, mask=key < length, other=0)
        known = (cell >= 0) & (cell < blocks)
        read = (known & (key < length))[:, None] & inside
        cell, place = cell.to(tl.int64), key % block
        here = shared * d + column[None, :]
        keys = tl.load(k + (cell * k_block + place * k_token)[:, None] + here, mask=read, other=0.0)
        values = tl.load(v + (cell * v_block + place * v_token)[:, None] + here, mask=read, other=0.0)
        scores = dot(q_tile, tl.trans(keys), tl.zeros((G, BN), tl.float32), UPCAST)
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
        new = tl.maximum(high, tl.max(scores, 1))
        p = tl.exp2((scores - new[:, None]) * slope)
        p = tl.where(known[None, :], p, float("nan"))
        shrunk = tl.exp2((high - new) * slope)
        acc = dot(p.to(v.dtype.element_ty), values, acc * shrunk[:, None], UPCAST)
        high, total = new, total * shrunk + tl.sum(p, 1)
    # [rows, n_q, parts]
    left = (row * tl.num_programs(1) * group + heads) * tl.num_programs(2) + part
    tl.store(highs + left, high, mask=own < group)
    tl.store(totals + left, total, mask=own < group)
    tl.store(outputs + left[:, None] * d + column[None, :], acc, mask=(own < group)[:, None] & inside)


@triton.jit
def _merge(
    outputs, highs, totals, lengths, out, out_row, block, width, parts, d, slope,
    KEYS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, column, step = tl.load(lengths + row), tl.arange(0, D), tl.arange(0, PARTS)
    left = (row * tl.num_programs(1) + head) * parts
    high = float("-inf")
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    used = tl.cdiv(min(length, width * block), KEYS)
    for at in range(0, used, PARTS):
        part = at + step
        highs_tile = tl.load(highs + left + part, mask=part < used, other=float("-inf"))
        totals_tile = tl.load(totals + left + part, mask=part < used, other=0.0)
        tile = tl.load(outputs + (left + part)[:, None] * d + column[None, :],
                       mask=(part < used)[:, None] & (column < d)[None, :], other=0.0)  # fmt: skip
        new = tl.maximum(high, tl.max(highs_tile, 0))
        weight = tl.exp2((highs_tile - new) * slope)
        shrunk = tl.exp2((high - new) * slope)
        acc = acc * shrunk + tl.sum(tile * weight[:, None], 0)
        total = total * shrunk + tl.sum(totals_tile * weight, 0)
        high = new
    result = acc / tl.where(length == 0, 1.0, total)
    result = tl.where((length < 0) | (length > width * block), float("nan"), result)
    tl.store(out + row * out_row + head * d + column, result.to(out.dtype.element_ty), mask=column < d)


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    n_q: int,
    n_kv: int,
    scale: float,
    out: Tensor,
) -> None:
    (rows, columns), (blocks, block, _), width = q.shape, k_pool.shape, block_table.shape[1]
    d, group, arch = columns // n_q, n_q // n_kv, architecture()
    padded = power_of_2(d, 16)
    if padded > SPLIT.cases[-1]:
        raise ValueError(f"q: expected heads of at most {SPLIT.cases[-1]}, got {d} (paged_attention in Triton)")
    split, merge = SPLIT.meta(arch, padded), MERGE.meta(arch)
    if q.dtype is torch.float32 and not INTERPRETED:  # for tests: twice as wide, and not on the tensor cores
        split |= {"BN": 32, "num_warps": 4, "num_stages": 1}
    parts, slope = triton.cdiv(width * block, split["KEYS"]), scale * LOG2E.value
    if not rows:
        return
    outputs = torch.empty((rows, n_q, parts, d), dtype=torch.float32, device=q.device)
    highs, totals = (torch.empty((rows, n_q, parts), dtype=torch.float32, device=q.device) for _ in range(2))
    if parts:
        _split[(rows, n_kv, parts)](
            q, q.stride(0), k_pool, k_pool.stride(0), k_pool.stride(1), v_pool, v_pool.stride(0), v_pool.stride(1),
            block_table, block_table.stride(0), lengths, outputs, highs, totals, blocks, block, width, group, d, slope,
            G=power_of_2(group, 16), D=padded, UPCAST=UPCAST, **split,
        )  # fmt: skip
    _merge[(rows, n_q)](
        outputs, highs, totals, lengths, out, out.stride(0), block, width, parts, d, slope,
        KEYS=split["KEYS"], D=padded, **merge,
    )  # fmt: skip
