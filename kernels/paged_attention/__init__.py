"""Attention of single rows over a paged key/value cache: the decode step.

Row m is one token of one sequence. Its first ``lengths[m]`` keys and values (its own among them) lie in the blocks
``block_table[m, 0], block_table[m, 1], ...`` of the pools, ``block`` tokens in each:

    o_m = sum_{j < lengths[m]} softmax_j(scale * q_m . k_j) v_j       q head h reads kv head h // (n_q // n_kv)

Bytes moved: the K and V of every row's context, once: ``2 * sum(lengths) * n_kv * d`` elements. Nothing else counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

__all__ = ["paged_attention"]

_op = Op("paged_attention")


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    n_q: int,
    n_kv: int,
    scale: float,
    *,
    out: Tensor | None = None,
    face: str | None = None,
) -> Tensor:
    """Attention of each row to the first ``lengths[m]`` tokens of its blocks.

    Table entries past the last needed block (-1 by convention), pool cells past the length and all other blocks are
    never read, whatever they hold.

    Args:
        q: ``[M, n_q*d]`` float32 or bfloat16 (the reference takes float64 too), any row stride.
        k_pool, v_pool: ``[n_blocks, block, n_kv*d]``, the dtype of q, last dimension contiguous.
        block_table: ``[M, max_blocks]`` int32, any row stride.
        lengths: ``[M]`` int32. 0 gives a row of zeros.
        n_q, n_kv: heads; n_q is a multiple of n_kv.
        scale: what the scores are multiplied with, above 0.
        out: ``[M, n_q*d]`` to write into, any row stride, or None.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``o [M, n_q*d]`` in the dtype of q.

    Raises:
        ValueError: an argument does not fit (a length or a needed table entry out of range too; on a GPU, where
            nothing waits for these, the row is NaN instead), or ``face`` cannot run.
    """
    op = "paged_attention"
    m, width = args.matrix(op, "q", q)
    if n_kv < 1 or n_q < 1 or n_q % n_kv:
        raise ValueError(f"n_q: expected a multiple of n_kv = {n_kv}, got {n_q} ({op})")
    if width % (2 * n_q):
        raise ValueError(f"q: expected n_q = {n_q} heads of an even dimension, got {width} columns ({op})")
    if k_pool.dim() != 3:
        raise ValueError(f"k_pool: expected 3 dimensions, got shape {list(k_pool.shape)} ({op})")
    cells = (k_pool.shape[0], k_pool.shape[1], width // n_q * n_kv)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        args.tensor(op, name, pool, cells, q.dtype)
    if k_pool.shape[1] < 1:
        raise ValueError(f"k_pool: expected blocks of at least one token, got shape {list(k_pool.shape)} ({op})")
    args.tensor(op, "block_table", block_table, (m, args.matrix(op, "block_table", block_table)[1]), torch.int32)
    args.tensor(op, "lengths", lengths, (m,), torch.int32)
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale: expected a finite number above 0, got {scale} ({op})")
    out = args.writable(op, "out", out, q, (m, width))
    run = _op.pick(face, q, k_pool, v_pool, out).paged_attention
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    run(q, k_pool, v_pool, block_table, lengths.contiguous(), n_q, n_kv, scale, out)
    return out
