"""Per-head RMSNorm and RoPE in Triton: a program holds up to 16 heads of one row, as two halves in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mint_engine.kernels.gpu_plan import Tunable
from mint_engine.kernels.triton_common import architecture, power_of_2, triton_reason

HEADS = Tunable("qk_norm_rope.heads", {"HEADS": (4, 8, 16, 32), "warps": (1, 2, 4, 8), "stages": (1,)})


def supports(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: torch.Tensor | None) -> str | None:
    """Why this face cannot run on these tensors, or None."""
    reason = triton_reason(qkv, *rest) or triton_reason(cos, sin)
    if reason is None and cos.device != qkv.device:
        return f"mixed devices {qkv.device} and {cos.device}"
    return reason


@triton.jit
def _weights(q_weight, k_weight, is_q, columns, inside, half):
    """The two halves of each head's norm weight, fp32 ``[heads, half]``."""
    q1 = tl.load(q_weight + columns, mask=inside, other=0.0)[None, :]
    q2 = tl.load(q_weight + half + columns, mask=inside, other=0.0)[None, :]
    k1 = tl.load(k_weight + columns, mask=inside, other=0.0)[None, :]
    k2 = tl.load(k_weight + half + columns, mask=inside, other=0.0)[None, :]
    w1 = tl.where(is_q, q1.to(tl.float32), k1.to(tl.float32))
    w2 = tl.where(is_q, q2.to(tl.float32), k2.to(tl.float32))
    return w1, w2


@triton.jit
def _forward(
    qkv, qkv_row, cos, cos_row, sin, sin_row, q_weight, k_weight, out, out_row, n_q, heads, half, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF)
    inside = columns < half
    mask = (head < heads) & inside[None, :]
    at = head * (2 * half) + columns[None, :]
    x1 = tl.load(qkv + row * qkv_row + at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(qkv + row * qkv_row + half + at, mask=mask, other=0.0).to(tl.float32)
    if q_weight is not None:
        w1, w2 = _weights(q_weight, k_weight, head < n_q, columns, inside, half)
        r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * half) + eps)[:, None]
        x1 = x1 * r * w1
        x2 = x2 * r * w2
    c = tl.load(cos + row * cos_row + columns, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + row * sin_row + columns, mask=inside, other=0.0)[None, :]
    dtype = out.dtype.element_ty
    tl.store(out + row * out_row + at, (x1 * c - x2 * s).to(dtype), mask=mask)
    tl.store(out + row * out_row + half + at, (x2 * c + x1 * s).to(dtype), mask=mask)


@triton.jit
def _backward(
    dqk, dqk_row, qkv, qkv_row, cos, cos_row, sin, sin_row, q_weight, k_weight, dqkv, dqkv_row, n_q, heads, half, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF)
    inside = columns < half
    mask = (head < heads) & inside[None, :]
    at = head * (2 * half) + columns[None, :]
    d1 = tl.load(dqk + row * dqk_row + at, mask=mask, other=0.0).to(tl.float32)
    d2 = tl.load(dqk + row * dqk_row + half + at, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + row * cos_row + columns, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + row * sin_row + columns, mask=inside, other=0.0)[None, :]
    g1 = d1 * c + d2 * s
    g2 = d2 * c - d1 * s
    if q_weight is not None:
        w1, w2 = _weights(q_weight, k_weight, head < n_q, columns, inside, half)
        x1 = tl.load(qkv + row * qkv_row + at, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(qkv + row * qkv_row + half + at, mask=mask, other=0.0).to(tl.float32)
        g1 *= w1
        g2 *= w2
        r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * half) + eps)[:, None]
        share = r * r * (tl.sum(g1 * x1 + g2 * x2, 1) / (2 * half))[:, None]
        g1 = r * (g1 - x1 * share)
        g2 = r * (g2 - x2 * share)
    dtype = dqkv.dtype.element_ty
    tl.store(dqkv + row * dqkv_row + at, g1.to(dtype), mask=mask)
    tl.store(dqkv + row * dqkv_row + half + at, g2.to(dtype), mask=mask)


def _geometry(m: int, heads: int, half: int) -> tuple[tuple[int, int], dict[str, int]]:
    meta = HEADS.meta(architecture())
    meta["HEADS"] = min(meta["HEADS"], power_of_2(heads))
    return (m, triton.cdiv(heads, meta["HEADS"])), {**meta, "HALF": power_of_2(half)}


def qk_norm_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    grid, meta = _geometry(len(qkv), n_q + n_kv, cos.shape[1])
    if len(qkv):
        _forward[grid](
            qkv, qkv.stride(0), cos, cos.stride(0), sin, sin.stride(0), q_weight, k_weight, out, out.stride(0),
            n_q, n_q + n_kv, cos.shape[1], eps, **meta,
        )  # fmt: skip


def qk_norm_rope_backward(
    dqk: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    dqkv: torch.Tensor,
) -> None:
    grid, meta = _geometry(len(qkv), n_q + n_kv, cos.shape[1])
    if len(qkv):
        _backward[grid](
            dqk, dqk.stride(0), qkv, qkv.stride(0), cos, cos.stride(0), sin, sin.stride(0), q_weight, k_weight,
            dqkv, dqkv.stride(0), n_q, n_q + n_kv, cos.shape[1], eps, **meta,
        )  # fmt: skip
