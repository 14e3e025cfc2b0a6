"""Causal attention over packed sequences in plain torch: the specification.

One sequence at a time, the whole score matrix, no autograd. float64 stays float64; other dtypes are computed in
float32 and rounded once at the end.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mint_engine.kernels.args import statistics_dtype


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
    queries = _bounds("attention", "cu_seqlens", cu_seqlens, len(q))
    for i, (rows, keys) in enumerate(zip(queries, _bounds("attention", "cu_keys", cu_keys, len(k)), strict=True)):
        n, own = rows.stop - rows.start, keys.stop - keys.start
        if own < n:
            raise ValueError(f"cu_keys: expected at least {n} keys, got {own} (attention, sequence {i})")
        if n == 0:
            continue
        qh, kh, vh = _heads(q[rows], n_q), _grouped(k[keys], n_q, n_kv), _grouped(v[keys], n_q, n_kv)
        scores = _causal_scores(qh, kh, scale)
        lse[:, rows] = torch.logsumexp(scores, dim=-1)
        out[rows] = _flatten(torch.softmax(scores, dim=-1) @ vh).to(out.dtype)


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
    for rows in _bounds("attention_backward", "cu_seqlens", cu_seqlens, len(q)):
        if rows.start == rows.stop:
            continue
        qh, kh, vh = _heads(q[rows], n_q), _grouped(k[rows], n_q, n_kv), _grouped(v[rows], n_q, n_kv)
        doh, oh = _heads(do[rows], n_q), _heads(o[rows], n_q)
        p = torch.exp(_causal_scores(qh, kh, scale) - lse[:, rows, None])
        delta = (doh * oh).sum(-1, keepdim=True)
        ds = p * (doh @ vh.mT - delta) * scale
        dq[rows] = _flatten(ds @ kh).to(dq.dtype)
        dk[rows] = _flatten(_sum_groups(ds.mT @ qh, n_kv)).to(dk.dtype)
        dv[rows] = _flatten(_sum_groups(p.mT @ doh, n_kv)).to(dv.dtype)


def _bounds(op: str, name: str, cumulative: Tensor, rows: int) -> list[slice]:
    """The row range of every sequence."""
    bounds = cumulative.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or sorted(bounds) != bounds:
        raise ValueError(f"{name}: expected bounds that rise from 0 to {rows} ({op})")
    return [slice(a, b) for a, b in pairwise(bounds)]


def _heads(x: Tensor, n: int) -> Tensor:
    """[S, n*d] -> [n, S, d], in the dtype the arithmetic runs in."""
    return x.unflatten(-1, (n, -1)).transpose(0, 1).to(statistics_dtype(x.dtype))


def _grouped(x: Tensor, n_q: int, n_kv: int) -> Tensor:
    """[S, n_kv*d] -> [n_q, S, d]: every kv head repeated for the q heads of its group."""
    return _heads(x, n_kv).repeat_interleave(n_q // n_kv, dim=0)


def _flatten(x: Tensor) -> Tensor:
    """[n, S, d] -> [S, n*d]."""
    return x.transpose(0, 1).flatten(1)


def _sum_groups(x: Tensor, n_kv: int) -> Tensor:
    """[n_q, S, d] -> [n_kv, S, d]: a kv head's gradient is the sum over the q heads that read it."""
    return x.unflatten(0, (n_kv, -1)).sum(1)


def _causal_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The queries are the last tokens: query i sees the keys up to its own, number ``keys - queries + i``."""
    queries, keys = q.shape[1], k.shape[1]
    future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    return (q @ k.mT * scale).masked_fill(future, -torch.inf)
