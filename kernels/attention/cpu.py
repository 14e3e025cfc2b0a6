"""Causal attention in C++ (csrc/attention.h, csrc/attention_backward.h)."""

from __future__ import annotations

from torch import Tensor

from mint_engine.kernels.op import NATIVE_DTYPES, native, native_reason


def supports(*tensors: Tensor | None) -> str | None:
    return native_reason(*tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_keys: Tensor,
    n_q: int,
    n_kv: int,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    m, d = q.shape[0], q.shape[1] // n_q
    native.attention(
        NATIVE_DTYPES[q.dtype], q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
        out.data_ptr(), out.stride(0), lse.data_ptr(), cu_seqlens.data_ptr(), cu_keys.data_ptr(), len(cu_seqlens) - 1,
        m, k.shape[0], n_q, n_kv, d, scale,
    )  # fmt: skip


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    n_q: int,
    n_kv: int,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    m, d = q.shape[0], q.shape[1] // n_q
    native.attention_backward(
        NATIVE_DTYPES[q.dtype], do.data_ptr(), do.stride(0), q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0),
        v.data_ptr(), v.stride(0), o.data_ptr(), o.stride(0), lse.data_ptr(), dq.data_ptr(), dq.stride(0),
        dk.data_ptr(), dk.stride(0), dv.data_ptr(), dv.stride(0), cu_seqlens.data_ptr(), len(cu_seqlens) - 1,
        m, n_q, n_kv, d, scale,
    )  # fmt: skip
