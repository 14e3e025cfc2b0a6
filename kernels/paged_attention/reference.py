"""Decode attention through block tables in plain torch: the specification. One row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels.args import statistics_dtype


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
    compute = statistics_dtype(q.dtype)
    block = k_pool.shape[1]
    for m, length in enumerate(lengths.tolist()):
        need = -(-length // block)
        blocks = block_table[m, :need].long()
        if length < 0 or len(blocks) < need:
            expected = f"0 to {block_table.shape[1] * block}, as block_table holds"
            raise ValueError(f"lengths: expected {expected}, got {length} (paged_attention, row {m})")
        if need and not 0 <= int(blocks.min()) <= int(blocks.max()) < len(k_pool):
            raise ValueError(
                f"block_table: expected {need} blocks of 0 .. {len(k_pool) - 1}, got {blocks.tolist()} "
                f"(paged_attention, row {m})"
            )
        k, v = (_gather(pool, blocks, length, n_q, n_kv).to(compute) for pool in (k_pool, v_pool))
        qm = q[m].unflatten(-1, (n_q, 1, -1)).to(compute)
        out[m] = (torch.softmax(qm @ k.mT * scale, dim=-1) @ v).flatten().to(out.dtype)


def _gather(pool: Tensor, blocks: Tensor, length: int, n_q: int, n_kv: int) -> Tensor:
    """The first ``length`` tokens of a row's blocks as [n_q, length, d], kv heads repeated for their groups."""
    tokens = pool[blocks].flatten(0, 1)[:length]
    return tokens.unflatten(-1, (n_kv, -1)).transpose(0, 1).repeat_interleave(n_q // n_kv, dim=0)
