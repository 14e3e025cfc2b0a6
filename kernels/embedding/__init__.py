"""Embedding lookup: rows of a table, by token."""

from __future__ import annotations

import torch

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

_op = Op("embedding")


def embedding(
    tokens: torch.Tensor, table: torch.Tensor, *, out: torch.Tensor | None = None, face: str | None = None
) -> torch.Tensor:
    """``out[i] = table[tokens[i]]``. The table may be a view: on tied models it is the unembedding's own rows.

    Args:
        tokens: ``[M]`` int64. Others than 0 to V - 1 are refused on the CPU; on a GPU, which would have to be waited
            for, their row is NaN.
        table: ``[V, H]`` float32, bfloat16 (the reference takes others too), any row stride.
        out: ``[M, H]`` to write into, any row stride, or None.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``out``.

    Bytes moved: 2 M H elements.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
        IndexError: a token is not in the table (on the CPU).
    """
    v, h = args.matrix("embedding", "table", table)
    if tokens.dim() != 1 or tokens.dtype is not torch.int64:
        raise ValueError(f"tokens: expected torch.int64 [M], got {tokens.dtype} {list(tokens.shape)} (embedding)")
    if tokens.is_cpu and len(tokens):
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= v:
            raise IndexError(f"tokens: expected 0 to {v - 1}, got {low} to {high} (embedding)")
    out = args.writable("embedding", "out", out, table, (len(tokens), h))
    _op.pick(face, table, out).embedding(tokens, table, out)
    return out
