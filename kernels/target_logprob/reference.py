"""Fused unembedding + log-softmax in plain torch, over chunks of rows so that logits stay small."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mint_engine.kernels.args import statistics_dtype
from mint_engine.kernels.target_logprob.border_share import BorderShare
from mint_engine.kernels.target_logprob.kept import Kept
from mint_engine.kernels.target_logprob.labels import Labels, resolve

_CHUNK_ELEMENTS = 1 << 26  # logits held at once


def _chunks(m: int, v: int) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(v, 1))
    return [slice(i, min(i + rows, m)) for i in range(0, m, rows)]


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = statistics_dtype(x.dtype)
    return x.to(wide) @ weight.to(wide).T


def target_logprob(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    logprob: torch.Tensor,
    lse: torch.Tensor,
    kept: Kept | None,  # nothing is
) -> None:
    targets = resolve(targets)
    for rows in _chunks(x.shape[0], weight.shape[0]):
        chunk = logits(x[rows], weight)
        lse[rows] = torch.logsumexp(chunk, dim=-1)
        picked = chunk.gather(1, targets[rows].clamp(min=0)) - lse[rows, None]
        logprob[rows] = picked.masked_fill(targets[rows] < 0, 0.0)


def target_logprob_with_gradient(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    gradient: Callable[[slice, torch.Tensor], torch.Tensor],
    border: int,
    logprob: torch.Tensor,
    lse: torch.Tensor,
    dx: torch.Tensor,
    dborder: torch.Tensor,
) -> None:
    target_logprob(x, weight, targets, logprob, lse, None)
    d = gradient(slice(0, len(x)), logprob)
    target_logprob_backward(x, weight, targets, d, lse, border, [BorderShare(0, len(x), 0, dborder)], None, None, dx)


def target_logprob_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor | Labels,
    dlogprob: torch.Tensor,
    lse: torch.Tensor,
    border: int,
    shares: Sequence[BorderShare],
    kept: Kept | None,
    rows: torch.Tensor | None,
    dx: torch.Tensor,
) -> None:
    wide, targets = statistics_dtype(x.dtype), resolve(targets)
    dlogprob = dlogprob.masked_fill(targets < 0, 0.0)
    v, h = weight.shape
    for some in _chunks(x.shape[0], v):
        dlogits = torch.exp(logits(x[some], weight) - lse[some, None])
        dlogits *= -dlogprob[some].sum(-1, keepdim=True)
        dlogits.scatter_add_(1, targets[some].clamp(min=0), dlogprob[some])
        dx[some] = (dlogits @ weight.to(wide)).to(x.dtype)
        for s in shares:
            rows_of = slice(max(s.start, some.start), min(s.stop, some.stop))
            if rows_of.start < rows_of.stop:
                column, width = h - border + s.column, s.grad.shape[1]
                own = dlogits[rows_of.start - some.start : rows_of.stop - some.start]
                s.grad.add_(own.T @ x[rows_of, column : column + width].to(wide))
