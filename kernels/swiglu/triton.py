"""SwiGLU in Triton: element by element, a block of one row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mint_engine.kernels.bordered_linear import Shrink
from mint_engine.kernels.bordered_linear.triton import matmul
from mint_engine.kernels.triton_common import power_of_2, row_warps
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401

MAX_BLOCK = 1024


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


def swiglu(gate_up: torch.Tensor, out: torch.Tensor, shrink: Shrink | None) -> None:
    m, f = out.shape
    block = min(MAX_BLOCK, power_of_2(f))
    if m and f:
        _forward[(m, triton.cdiv(f, block))](
            gate_up, gate_up.stride(0), out, out.stride(0), f, BLOCK=block, num_warps=row_warps(block)
        )
    if shrink is not None:
        matmul(out, shrink.a.T, shrink.s, scale=shrink.scale)


def swiglu_backward(da: torch.Tensor, gate_up: torch.Tensor, dgate_up: torch.Tensor, a: torch.Tensor) -> None:
    m, f = a.shape
    block = min(MAX_BLOCK, power_of_2(f))
    if m and f:
        _backward[(m, triton.cdiv(f, block))](
            da, da.stride(0), gate_up, gate_up.stride(0), dgate_up, dgate_up.stride(0), a, a.stride(0), f,
            BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
