"""Causal attention over packed sequences, forward and backward.

A batch is M tokens laid end to end; ``cu_seqlens [n_seqs + 1]`` (int32, on the CPU) holds the bounds of its sequences,
so token i attends to the tokens j <= i of its own sequence. Equal neighbours are an empty sequence. With
``cu_keys`` the forward takes sequences whose first tokens have keys but no queries: their results are known already.
Grouped heads: q head h reads kv head ``h // (n_q // n_kv)``. With s_ij = scale * q_i . k_j,

    forward    lse_i = log sum_{j<=i} exp s_ij,   o_i = sum_{j<=i} exp(s_ij - lse_i) v_j
    backward   p_ij = exp(s_ij - lse_i),   delta_i = do_i . o_i,   ds_ij = scale * p_ij (do_i . v_j - delta_i)
               dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i,   dv_j = sum_i p_ij do_i

with dk and dv summed over a group's q heads too (FlashAttention-2, arXiv:2307.08691). The score matrix is never
stored: bytes moved are those of the arguments and results, plus K and V once per query tile.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.attention.bounds import Bounds
from mint_engine.kernels.op import Op

__all__ = ["Bounds", "attention", "attention_backward"]

_op = Op("attention")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Bounds,
    n_q: int,
    n_kv: int,
    scale: float,
    *,
    cu_keys: Tensor | Bounds | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    face: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each sequence of a packed batch.

    Args:
        q: ``[M, n_q*d]`` float32 or bfloat16 (the reference takes float64 too), any row stride; d is even.
        k, v: ``[M, n_kv*d]`` (``[keys, n_kv*d]`` with ``cu_keys``), the dtype of q, any row stride.
        cu_seqlens: ``[n_seqs + 1]`` int32 on the CPU, rising or level from 0 to M; or `Bounds`, whose contents
            may change between replays of a captured call.
        n_q, n_kv: heads; n_q is a multiple of n_kv.
        scale: what the scores are multiplied with, above 0.
        cu_keys: ``[n_seqs + 1]`` int32 like cu_seqlens, where sequences have more keys than queries: sequence i's keys
            are rows ``cu_keys[i]:cu_keys[i+1]`` of k and v, and its queries are those of its last tokens. The bits of
            a row do not depend on how many queries come with it.
        out: ``[M, n_q*d]`` to write into, any row stride, or None.
        lse: ``[n_q, M]`` float32, contiguous, to write into, or None.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        ``(o [M, n_q*d] in the dtype of q, lse [n_q, M] natural logarithm, float32)``.

    Raises:
        ValueError: an argument does not fit, or ``face`` cannot run.
    """
    shape = _check("attention", q, k, v, cu_seqlens, n_q, n_kv, scale, len(q) if cu_keys is None else len(k))
    if cu_keys is None:
        cu_keys = cu_seqlens
    else:
        if isinstance(cu_seqlens, Bounds) or isinstance(cu_keys, Bounds):
            raise ValueError("cu_keys: expected None with Bounds, got bounds of their own (attention)")
        _check_bounds("attention", "cu_keys", cu_keys)
        args.tensor("attention", "cu_keys", cu_keys, (len(cu_seqlens),), torch.int32)
    out = args.writable("attention", "out", out, q, shape)
    if lse is None:
        lse = torch.empty(n_q, shape[0], dtype=args.statistics_dtype(q.dtype), device=q.device)
    args.tensor("attention", "lse", lse, (n_q, shape[0]), args.statistics_dtype(q.dtype))
    if not lse.is_contiguous():
        raise ValueError("lse: expected a contiguous tensor (attention)")
    chosen = _op.pick(face, q, k, v, out)
    queries, keys = (_bounds_for(chosen, bounds, q) for bounds in (cu_seqlens, cu_keys))
    chosen.attention(q, k, v, queries, keys, n_q, n_kv, scale, out, lse)
    return out, lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | Bounds,
    n_q: int,
    n_kv: int,
    scale: float,
    *,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    face: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``attention`` for q, k and v. Deterministic, whatever the number of threads.

    Args:
        do: ``[M, n_q*d]``, the gradient of o, any row stride.
        q, k, v, cu_seqlens, n_q, n_kv, scale: what the forward took.
        o, lse: what the forward returned.
        dq, dk, dv: shaped and typed like q, k, v; overwritten, never added to. Any row stride: they may be the column
            blocks of one dqkv buffer. None allocates.
        face: run this face or raise.

    Returns:
        ``(dq, dk, dv)``.

    Raises:
        ValueError: an argument does not fit, or ``face`` cannot run.
    """
    op = "attention_backward"
    shape = _check(op, q, k, v, cu_seqlens, n_q, n_kv, scale, len(q))
    for name, t in (("do", do), ("o", o)):
        args.tensor(op, name, t, shape, q.dtype)
    args.tensor(op, "lse", lse, (n_q, shape[0]), args.statistics_dtype(q.dtype))
    dq = args.writable(op, "dq", dq, q, shape)
    dk = args.writable(op, "dk", dk, k, (shape[0], k.shape[1]))
    dv = args.writable(op, "dv", dv, v, (shape[0], v.shape[1]))
    chosen = _op.pick(face, q, do, k, v, o, dq, dk, dv)
    bounds = _bounds_for(chosen, cu_seqlens, q)
    chosen.attention_backward(do, q, k, v, o, lse.contiguous(), bounds, n_q, n_kv, scale, dq, dk, dv)
    return dq, dk, dv


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | Bounds, n_q: int, n_kv: int, scale: float, keys: int
) -> tuple[int, int]:
    """The shape of q, after checks of everything both directions take."""
    m, width = args.matrix(op, "q", q)
    if n_kv < 1 or n_q < 1 or n_q % n_kv:
        raise ValueError(f"n_q: expected a multiple of n_kv = {n_kv}, got {n_q} ({op})")
    if width % (2 * n_q):
        raise ValueError(f"q: expected n_q = {n_q} heads of an even dimension, got {width} columns ({op})")
    for name, t in (("k", k), ("v", v)):
        args.tensor(op, name, t, (keys, width // n_q * n_kv), q.dtype)
    _check_bounds(op, "cu_seqlens", cu_seqlens)
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale: expected a finite number above 0, got {scale} ({op})")
    return m, width


def _bounds_for(face: ModuleType, bounds: Tensor | Bounds, q: Tensor) -> Tensor | Bounds:
    """The bounds as the face takes them. One that reads them on the host must not run where a replay would not."""
    if not isinstance(bounds, Bounds) or getattr(face, "TAKES_BOUNDS", False):
        return bounds
    if not q.is_cpu:
        raise ValueError(f"cu_seqlens: {face.__name__} takes no Bounds on {q.device} (attention)")
    return bounds.host


def _check_bounds(op: str, name: str, bounds: Tensor | Bounds) -> None:
    if isinstance(bounds, Bounds):
        return  # checked when they were written
    if bounds.dim() != 1 or len(bounds) < 1 or bounds.dtype is not torch.int32 or not bounds.is_cpu:
        raise ValueError(
            f"{name}: expected torch.int32 [n_seqs + 1] on the CPU, got {bounds.dtype} {list(bounds.shape)} on "
            f"{bounds.device} ({op})"
        )
    if not bounds.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor ({op})")
