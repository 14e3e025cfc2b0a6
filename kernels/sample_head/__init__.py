"""Unembedding and draw in one: tokens from hidden rows, the logits never kept.

    z = x @ weightᵀ;   p = softmax(z / temperature)     temperature 0: the likeliest token, with the p of temperature 1
    token = the first v, in token order, with sum_{w <= v} p_w > u * sum_w p_w

What `sample_rows` does with the filters off, of what `logits` gives. Bytes moved: the weight once (for up to a tile of
rows), and per row and tile of tokens two numbers; logits would be R V fp32, written and read several times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

__all__ = ["sample_head"]

_op = Op("sample_head")


def sample_head(
    x: Tensor, weight: Tensor, temperature: Tensor, uniforms: Tensor, *, face: str | None = None
) -> tuple[Tensor, Tensor]:
    """One token for each row.

    Args:
        x: ``[R, K]`` float32 or bfloat16, any row stride: hidden rows, with an adapter's S in their tail.
        weight: ``[V, K]`` of the same dtype, V >= 1, any row stride: the unembedding, with its border.
        temperature: ``[R]`` float32, at least 0.
        uniforms: ``[R]`` float64 in [0, 1).
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``(tokens [R] int64, log-probabilities [R] float32)``: 0 and NaN for a row whose logits hold NaN or +inf, or
        -inf alone.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    op = "sample_head"
    rows, k = args.matrix(op, "x", x)
    vocab = args.matrix(op, "weight", weight)[0]
    if vocab < 1:
        raise ValueError(f"weight: expected [V, {k}], V >= 1, got {list(weight.shape)} ({op})")
    args.tensor(op, "weight", weight, (vocab, k), x.dtype)
    args.tensor(op, "temperature", temperature, (rows,), torch.float32)
    args.tensor(op, "uniforms", uniforms, (rows,), torch.float64)
    drawn: tuple[Tensor, Tensor] = _op.pick(face, x, weight).sample_head(x, weight, temperature, uniforms)
    return drawn
