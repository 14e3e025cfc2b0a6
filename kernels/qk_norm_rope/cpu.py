"""Per-head RMSNorm and RoPE in C++ (csrc/qk_norm_rope.h)."""

from __future__ import annotations

import torch

from mint_engine.kernels.op import NATIVE_DTYPES, native, native_reason
from mint_engine.kernels.qk_norm_rope import reference


def supports(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: torch.Tensor | None) -> str | None:
    """Why this face cannot run on these tensors, or None."""
    return native_reason(qkv, *rest) or native_reason(cos, sin)


def _weights(q_weight: torch.Tensor | None, k_weight: torch.Tensor | None) -> tuple[int, int]:
    if q_weight is None or k_weight is None:
        return 0, 0
    return q_weight.data_ptr(), k_weight.data_ptr()


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
    native.qk_norm_rope(
        NATIVE_DTYPES[qkv.dtype], qkv.data_ptr(), qkv.stride(0), cos.data_ptr(), cos.stride(0),
        sin.data_ptr(), sin.stride(0), n_q, n_kv, *_weights(q_weight, k_weight), eps,
        out.data_ptr(), out.stride(0), qkv.shape[0], 2 * cos.shape[1],
    )  # fmt: skip


def qk_norm_rope_cached(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_q: int,
    n_kv: int,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """The C++ and two copies: a decode step on a CPU is one call of its own (`decode_step`)."""
    qk = qkv.new_empty(len(qkv), out.shape[1] + k_pool.shape[2])
    qk_norm_rope(qkv, cos, sin, n_q, n_kv, q_weight, k_weight, eps, qk)
    reference.store(qkv, qk, k_pool, v_pool, slots, out)


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
    native.qk_norm_rope_backward(
        NATIVE_DTYPES[qkv.dtype], dqk.data_ptr(), dqk.stride(0), qkv.data_ptr(), qkv.stride(0),
        cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), n_q, n_kv, *_weights(q_weight, k_weight), eps,
        dqkv.data_ptr(), dqkv.stride(0), qkv.shape[0], 2 * cos.shape[1],
    )  # fmt: skip
