"""Fused unembedding + log-softmax in plain torch, over chunks of rows so that logits stay small."""

from __future__ import annotations

import torch

from mint_engine.kernels.args import statistics_dtype

_CHUNK_ELEMENTS = 1 << 26  # logits held at once


def _chunks(m: int, v: int) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(v, 1))
    return [slice(i, min(i + rows, m)) for i in range(0, m, rows)]


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = statistics_dtype(x.dtype)
    return x.to(wide) @ weight.to(wide).T


def target_logprob(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = statistics_dtype(x.dtype)
    logprob = torch.zeros(targets.shape, dtype=wide, device=x.device)
    lse = torch.empty(x.shape[0], dtype=wide, device=x.device)
    for rows in _chunks(x.shape[0], weight.shape[0]):
        chunk = logits(x[rows], weight)
        lse[rows] = torch.logsumexp(chunk, dim=-1)
        picked = chunk.gather(1, targets[rows].clamp(min=0)) - lse[rows, None]
        logprob[rows] = picked.masked_fill(targets[rows] < 0, 0.0)
    return logprob, lse


def target_logprob_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dlogprob: torch.Tensor,
    lse: torch.Tensor,
    border: int,
    spans: torch.Tensor | None = None,  # what they leave out is zero
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = statistics_dtype(x.dtype)
    v, h = weight.shape
    dx = torch.empty_like(x)
    dborder = torch.zeros((v, border), dtype=wide, device=x.device)
    for rows in _chunks(x.shape[0], v):
        dlogits = torch.exp(logits(x[rows], weight) - lse[rows, None])
        dlogits *= -dlogprob[rows].sum(-1, keepdim=True)
        dlogits.scatter_add_(1, targets[rows].clamp(min=0), dlogprob[rows])
        dx[rows] = (dlogits @ weight.to(wide)).to(x.dtype)
        dborder += dlogits.T @ x[rows, h - border :].to(wide)
    return dx, dborder
