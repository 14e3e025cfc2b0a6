"""From rows of logits to tokens: temperature, top-k, top-p, one draw a row, and log-probabilities.

    p = softmax(z / temperature)        temperature 0: the likeliest token, with the p of temperature 1
    kept = the top_k likeliest, then of these the smallest set whose share of their mass is top_p or more
    token = the first v, in token order, with sum_{w <= v, kept} p_w > u * sum_{kept} p_w

Among equally likely tokens the smaller id comes first, in both filters and for temperature 0. Log-probabilities are of
p, not of what the filters leave. A row depends on nothing but itself, so a uniform number fixes its token. Bytes moved:
the logits once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

__all__ = ["sample_rows", "top_logprobs"]

_op = Op("sample_rows")


def sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor, *, face: str | None = None
) -> tuple[Tensor, Tensor]:
    """One token for each row.

    Args:
        logits: ``[R, V]`` float32 (the reference takes float64 too), any row stride.
        temperature: ``[R]`` float32, at least 0.
        top_k: ``[R]`` int64; below 1 is off.
        top_p: ``[R]`` float64; 1 and above is off.
        uniforms: ``[R]`` float64 in [0, 1).
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``(tokens [R] int64, log-probabilities [R])``: 0 and NaN for a row that holds NaN or +inf, or -inf alone.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    op = "sample_rows"
    rows = _check(op, logits, temperature)
    args.tensor(op, "top_k", top_k, (rows,), torch.int64)
    args.tensor(op, "top_p", top_p, (rows,), torch.float64)
    args.tensor(op, "uniforms", uniforms, (rows,), torch.float64)
    drawn: tuple[Tensor, Tensor] = _op.pick(face, logits).sample_rows(logits, temperature, top_k, top_p, uniforms)
    return drawn


def top_logprobs(logits: Tensor, temperature: Tensor, k: int, *, face: str | None = None) -> tuple[Tensor, Tensor]:
    """``(tokens [R, k] int64, log-probabilities [R, k])`` of the k likeliest tokens of each row, in order.

    Arguments and rows that are no distribution: as in :func:`sample_rows`.

    Raises:
        ValueError: ``k`` is not in [1, V], a shape or dtype does not match, or ``face`` cannot run.
    """
    _check("top_logprobs", logits, temperature)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k: expected 1 to {logits.shape[1]}, got {k} (top_logprobs)")
    found: tuple[Tensor, Tensor] = _op.pick(face, logits).top_logprobs(logits, temperature, k)
    return found


def _check(op: str, logits: Tensor, temperature: Tensor) -> int:
    rows, vocab = args.matrix(op, "logits", logits)
    if vocab < 1 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits: expected float32 [R, V], V >= 1, got {logits.dtype} {list(logits.shape)} ({op})")
    args.tensor(op, "temperature", temperature, (rows,), torch.float32)
    return rows
