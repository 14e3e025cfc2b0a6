"""Decode attention over a paged cache in C++ (csrc/paged_attention.h)."""

from __future__ import annotations

from torch import Tensor

from mint_engine.kernels.op import NATIVE_DTYPES, native, native_reason


def supports(*tensors: Tensor | None) -> str | None:
    return native_reason(*tensors)


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
    n_blocks, block, _ = k_pool.shape
    native.paged_attention(
        NATIVE_DTYPES[q.dtype], q.data_ptr(), q.stride(0), k_pool.data_ptr(), k_pool.stride(0), k_pool.stride(1),
        v_pool.data_ptr(), v_pool.stride(0), v_pool.stride(1), block_table.data_ptr(), block_table.stride(0),
        lengths.data_ptr(), out.data_ptr(), out.stride(0), q.shape[0], n_blocks, block, block_table.shape[1],
        n_q, n_kv, q.shape[1] // n_q, scale,
    )  # fmt: skip
