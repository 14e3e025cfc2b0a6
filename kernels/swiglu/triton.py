"""SwiGLU in Triton: element by element, a block of one row a program.

With an adapter's S a program takes some whole rows and sums S from the rounded result while it is in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mint_engine.kernels.bordered_linear import Shrink
from mint_engine.kernels.bordered_linear.triton import matmul
from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.triton_common import UPCAST, architecture, dot, power_of_2
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401


def _shared(row: Row, ranks: int) -> int:
    return 2 * row["stages"] * row["BK"] * (2 * row["BM"] + ranks)


ELEMENTS = Tunable("swiglu.elements", {"BLOCK": (512, 1024, 2048, 4096), "warps": (4, 8), "stages": (1,)})
SHRINK = Tunable(
    "swiglu.shrink", {"BM": (16, 32, 64), "BK": (64, 128, 256), "warps": (4, 8), "stages": (1, 2, 3)},
    cases=(16, 32, 64, 128, 256), shared=_shared,
)  # fmt: skip


@triton.jit
def _forward(gate_up, gate_up_row, out, out_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * gate_up_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + width + columns, mask=inside, other=0.0).to(tl.float32)
    a = gate * (1.0 / (1.0 + tl.exp(-gate))) * up
    tl.store(out + row * out_row + columns, a.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_shrink(
    gate_up, gate_up_row, out, out_row, a, a_row, s, s_row, m, width, ranks, scale,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BM rows a program, all columns: S is summed while they pass."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    here = (row < m)[:, None]
    row = row.to(tl.int64)[:, None]
    step, rank = tl.arange(0, BK), tl.arange(0, R)
    acc = tl.zeros((BM, R), tl.float32)
    for at in range(0, width, BK):
        columns = (at + step)[None, :]
        mask = here & (columns < width)
        gate = tl.load(gate_up + row * gate_up_row + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * gate_up_row + width + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = (gate * (1.0 / (1.0 + tl.exp(-gate))) * up).to(out.dtype.element_ty)
        tl.store(out + row * out_row + columns, rounded, mask=mask)
        factor = tl.load(
            a + rank.to(tl.int64)[None, :] * a_row + (at + step)[:, None],
            mask=(rank < ranks)[None, :] & (at + step < width)[:, None], other=0.0,
        )  # fmt: skip
        acc = dot(rounded, factor, acc, UPCAST)
    tl.store(s + row * s_row + rank[None, :], (acc * scale).to(s.dtype.element_ty), mask=here & (rank < ranks)[None, :])


@triton.jit
def _backward(da, da_row, gate_up, gate_up_row, dgate_up, dgate_up_row, a, a_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * gate_up_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + width + columns, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(da + row * da_row + columns, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * s
    dtype = a.dtype.element_ty
    tl.store(a + row * a_row + columns, (silu * up).to(dtype), mask=inside)
    dgate = d * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_up + row * dgate_up_row + columns, dgate.to(dtype), mask=inside)
    tl.store(dgate_up + row * dgate_up_row + width + columns, (d * silu).to(dtype), mask=inside)


def _blocks(m: int, width: int) -> tuple[tuple[int, int], Row]:
    meta = ELEMENTS.meta(architecture())
    meta["BLOCK"] = min(meta["BLOCK"], power_of_2(width))
    return (m, triton.cdiv(width, meta["BLOCK"])), meta


def swiglu(gate_up: torch.Tensor, out: torch.Tensor, shrink: Shrink | None) -> None:
    m, f = out.shape
    if not (m and f):
        return
    if shrink is not None and 0 < len(shrink.a) <= SHRINK.cases[-1]:
        ranks = power_of_2(len(shrink.a), 16)
        meta = SHRINK.meta(architecture(), ranks)
        if out.dtype is torch.float32:  # for tests: twice as wide
            meta["num_stages"], meta["BK"] = 1, 64
        _swiglu_shrink[(triton.cdiv(m, meta["BM"]),)](
            gate_up, gate_up.stride(0), out, out.stride(0), shrink.a, shrink.a.stride(0), shrink.s, shrink.s.stride(0),
            m, f, len(shrink.a), float(shrink.scale), R=ranks, UPCAST=UPCAST, **meta,
        )  # fmt: skip
        return
    grid, meta = _blocks(m, f)
    _forward[grid](gate_up, gate_up.stride(0), out, out.stride(0), f, **meta)
    if shrink is not None:
        matmul(out, shrink.a.T, shrink.s, scale=shrink.scale)


def swiglu_backward(da: torch.Tensor, gate_up: torch.Tensor, dgate_up: torch.Tensor, a: torch.Tensor) -> None:
    m, f = a.shape
    if m and f:
        grid, meta = _blocks(m, f)
        _backward[grid](
            da, da.stride(0), gate_up, gate_up.stride(0), dgate_up, dgate_up.stride(0), a, a.stride(0), f, **meta
        )  # fmt: skip
