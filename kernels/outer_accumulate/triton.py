"""The adapter gradients' product in Triton: one pass over the wide operand.

A program owns a tile of out for a chunk of rows. With one chunk it adds to out itself; with more, each leaves its sum
in scratch and a second kernel adds them in order: no atomics, so the same call gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.gpu_plan import FUSED, Row, Tunable
from mint_engine.kernels.triton_common import UPCAST, architecture, dot, power_of_2, triton_reason

MOST_CHUNKS = 32  # beyond, chunks grow: their sums are scratch


def _shared(row: Row, narrow: int) -> int:
    return 2 * row["stages"] * row["BM"] * (row["BW"] + narrow)


# chunk: rows summed in registers: enough programs for a GPU, and short chains of fp32 additions
SUM_ROWS = Tunable(
    "outer_accumulate.sum_rows",
    {"chunk": (256, 512, 1024, 2048), "BM": (32, 64, 128), "BW": (64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=(16, 32, 64), shared=_shared,
)  # fmt: skip


def supports(a: Tensor, b: Tensor, out: Tensor) -> str | None:
    """Why this face cannot run on these tensors, or None."""
    return triton_reason(a, b) or triton_reason(out)


@triton.jit
def _sum_rows(
    wide, wide_row, narrow, narrow_row, out, out_chunk, out_w, out_n, m, n_wide, n_narrow, chunk, alpha,
    ADD: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    column_w = tl.program_id(0) * BW + tl.arange(0, BW)
    column_n = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * chunk
    last = min(first + chunk, m)
    inside_w, inside_n = column_w < n_wide, column_n < n_narrow
    acc = tl.zeros((BW, BN), tl.float32)
    for at in range(first, last, BM):
        row = at + tl.arange(0, BM)
        mask = (row < last)[:, None]
        row = row.to(tl.int64)[:, None]
        w = tl.load(wide + row * wide_row + column_w[None, :], mask=mask & inside_w[None, :], other=0.0)
        n = tl.load(narrow + row * narrow_row + column_n[None, :], mask=mask & inside_n[None, :], other=0.0)
        acc = dot(tl.trans(w), n, acc, UPCAST)
    acc *= alpha
    where = out + tl.program_id(2).to(tl.int64) * out_chunk
    where += column_w.to(tl.int64)[:, None] * out_w + column_n.to(tl.int64)[None, :] * out_n
    mask = inside_w[:, None] & inside_n[None, :]
    if ADD:
        acc += tl.load(where, mask=mask, other=0.0)
    tl.store(where, acc, mask=mask)


@triton.jit
def _add_chunks(parts, chunks, out, out_row, count, q, BLOCK: tl.constexpr):
    """``out [p, q] += sum of parts [chunks, p, q]``, in order; count = p q."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(chunks):
        total += tl.load(parts + at, mask=inside, other=0.0)
        parts += count
    where = out + at // q * out_row + at % q
    tl.store(where, tl.load(where, mask=inside, other=0.0) + total, mask=inside)


def outer_accumulate(a: Tensor, b: Tensor, out: Tensor, alpha: float) -> None:
    (p, q), m = out.shape, a.shape[0]
    if not (m and p and q):
        return
    bn = min(64, power_of_2(min(p, q), 16))
    meta = SUM_ROWS.meta(architecture(), bn)
    if a.dtype is torch.float32:  # for tests: twice as wide
        meta["num_stages"] = min(meta["num_stages"], 2)
    chunk = max(meta.pop("chunk"), triton.cdiv(triton.cdiv(m, MOST_CHUNKS), meta["BM"]) * meta["BM"])
    chunks = triton.cdiv(m, chunk)
    target = out if chunks == 1 else torch.empty((chunks, p, q), dtype=torch.float32, device=out.device)
    wide, narrow, out_w, out_n = a, b, target.stride(-2), 1
    if p < q:
        wide, narrow, out_w, out_n = b, a, 1, target.stride(-2)
    meta["BW"] = min(meta["BW"], power_of_2(wide.shape[1], 16))
    _sum_rows[(triton.cdiv(wide.shape[1], meta["BW"]), triton.cdiv(narrow.shape[1], bn), chunks)](
        wide, wide.stride(0), narrow, narrow.stride(0), target, 0 if chunks == 1 else target.stride(0), out_w, out_n,
        m, wide.shape[1], narrow.shape[1], chunk, float(alpha),
        ADD=chunks == 1, BN=bn, UPCAST=UPCAST, **meta,
    )  # fmt: skip
    if chunks > 1:
        block = min(1024, power_of_2(p * q))
        _add_chunks[(triton.cdiv(p * q, block),)](
            target, chunks, out, out.stride(0), p * q, q, BLOCK=block, num_warps=4, **FUSED
        )
