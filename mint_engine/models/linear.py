"""Forward and backward of a bordered weight over the rows of a pass, each segment with its own adapter.

S and dS ride in the tails of their buffers. A pass of few adapters multiplies them with the border in the base's own
GEMM; in a grouped one (`company.py`) the base's GEMM leaves the tails out and each adapter is added to its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.adapters import GroupFactors
from mint_engine.borders import BorderedWeight, Seating
from mint_engine.kernels import (
    bordered_linear,
    bordered_linear_backward,
    expand_backward,
    outer_accumulate,
    shrink,
)
from mint_engine.models import company

# Where a backward pass leaves gradients: adapter uid -> group name -> fp32 factors to add to.
Gradients = dict[int, dict[str, GroupFactors]]


def _tail(w: BorderedWeight, seating: Seating) -> int:
    """Columns of S: in a grouped pass every adapter's are the first, else they are where the adapter sits."""
    return company.tail(w, seating) if seating.grouped else w.m * seating.ranks_of(w.group)


def input_buffer(w: BorderedWeight, rows: int, seating: Seating) -> Tensor:
    """An uninitialised ``[rows, K + p]``: the caller writes X into the first K columns, then :func:`shrink_tail` S."""
    return torch.empty(rows, w.k + _tail(w, seating), dtype=w.buf.dtype, device=w.buf.device)


def shrink_tail(w: BorderedWeight, x: Tensor, seating: Seating) -> None:
    """Fill the tail of ``x`` [rows, K + p] with S: each segment's own columns, zeros elsewhere (if not grouped)."""
    if seating.grouped:
        company.shrink(w, x, seating)
        return
    segments = seating.of(w.group)
    tail = x[:, w.k :]
    if len(segments) != 1 or segments[0].adapter.rank != seating.ranks or segments[0].stop - segments[0].start < len(x):
        tail.zero_()
    for s in segments:
        rank = s.adapter.rank
        columns = tail[s.start : s.stop, w.m * s.offset : w.m * (s.offset + rank)]
        shrink(x[s.start : s.stop, : w.k], w.a(s.offset, rank), s.adapter.scale, out=columns)


def forward(w: BorderedWeight, x: Tensor, seating: Seating) -> Tensor:
    """``y [rows, N]`` from ``x [rows, K + p]`` whose tail is filled."""
    if seating.grouped:
        return company.expand(w, x, bordered_linear(x[:, : w.k], w.weight, bias=w.bias), seating)
    return bordered_linear(x, w.forward_weight(seating.ranks_of(w.group)), bias=w.bias)


def gradient_buffer(w: BorderedWeight, rows: int, seating: Seating) -> Tensor:
    """An uninitialised ``[rows, N + p]``: the caller writes dY into the first N columns."""
    return torch.empty(rows, w.n + _tail(w, seating), dtype=w.buf.dtype, device=w.buf.device)


def shrink_gradient(w: BorderedWeight, dy: Tensor, seating: Seating) -> None:
    """Fill the tail of ``dy`` [rows, N + p] with dS."""
    if seating.grouped:
        company.shrink_gradient(w, dy, seating)
        return
    segments = seating.of(w.group)
    if segments:
        dy[:, w.n :].zero_()
    for s in segments:
        rank, row = s.adapter.rank, 0
        for j, b in enumerate(w.b(s.offset, rank)):
            column = w.n + w.m * s.offset + j * rank
            d_s = dy[s.start : s.stop, column : column + rank]
            expand_backward(dy[s.start : s.stop, row : row + b.shape[0]], b, s.adapter.scale, out=d_s)
            row += b.shape[0]


def backward(w: BorderedWeight, dy: Tensor, seating: Seating) -> Tensor:
    """``dx [rows, K]`` from ``dy [rows, N + p]`` whose tail is filled."""
    if seating.grouped:
        return company.expand_gradient(w, dy, bordered_linear_backward(dy[:, : w.n], w.weight), seating)
    return bordered_linear_backward(dy, w.backward_weight(seating.ranks_of(w.group)))


def accumulate(w: BorderedWeight, dy: Tensor, x: Tensor, s_tail: Tensor, seating: Seating, grads: Gradients) -> None:
    """Add dA = dSᵀ X and dB_j = dY_jᵀ S_j of every segment to ``grads``.

    ``dy [rows, N + p]`` with the tail filled, ``x [rows, K]``, ``s_tail [rows, p]`` from the forward pass.
    """
    if seating.grouped:
        outs = [grads[s.adapter.uid][w.group.name].a for s in seating.of(w.group)]
        company.accumulate(w, dy, x, s_tail, seating, outs)
        return
    for s in seating.of(w.group):
        rows, rank, row = slice(s.start, s.stop), s.adapter.rank, 0
        out = grads[s.adapter.uid][w.group.name]
        columns = slice(w.m * s.offset, w.m * (s.offset + rank))
        outer_accumulate(dy[rows, w.n :][:, columns], x[rows], out.a)
        shrunk = s_tail[rows, columns]
        for j, d_b in enumerate(out.b):
            n = d_b.shape[0]
            outer_accumulate(dy[rows, row : row + n], shrunk[:, j * rank : (j + 1) * rank], d_b)
            row += n
