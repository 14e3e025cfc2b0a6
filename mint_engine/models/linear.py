"""Forward and backward of a bordered weight over the rows of a pass, each segment with its own adapter.

S and dS ride in the tails of their buffers. A pass of few adapters multiplies them with the border in the base's own
GEMM; in a grouped one (`company.py`) the base's GEMM leaves the tails out and each adapter is added to its own rows.
Where several share a pass, S, dS, dA and dB of all are one call each.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mint_engine.adapters import GroupFactors
from mint_engine.borders import BorderedWeight, Seating, Segment
from mint_engine.kernels import (
    Shrink,
    bordered_by_tile,
    bordered_by_tile_backward,
    bordered_linear,
    bordered_linear_backward,
    lora_gradients,
    outer_accumulate,
    shrink,
)
from mint_engine.models import company

# Where a backward pass leaves gradients: adapter uid -> group name -> fp32 factors to add to.
Gradients = dict[int, dict[str, GroupFactors]]


def tail(w: BorderedWeight, seating: Seating) -> int:
    """Columns of S, and of dS."""
    return company.tail(w, seating) if seating.by_table else w.m * seating.ranks_of(w.group)


def shrink_along(w: BorderedWeight, x: Tensor, seating: Seating) -> Shrink | None:
    """How the op that writes X into ``x`` [rows, K + p] fills its tail too: where one adapter has all of the rows.

    None: it cannot, and :func:`shrink_tail` must.
    """
    segments = seating.of(w.group)
    if seating.by_table or not has_all(segments, seating, len(x)):
        return None
    (s,) = segments
    return Shrink(w.a(s.offset, s.adapter.rank), s.adapter.scale, x[:, w.k :])


def has_all(segments: Sequence[Segment], seating: Seating, rows: int) -> bool:
    """Whether one adapter has all of the ``rows``, and the border for itself."""
    if len(segments) != 1:
        return False
    (s,) = segments
    return s.stop - s.start == rows and s.adapter.rank == seating.ranks


def shrink_tail(w: BorderedWeight, x: Tensor, seating: Seating) -> None:
    """Fill the tail of ``x`` [rows, K + p] with S: each segment's own columns, zeros elsewhere (if not by table)."""
    if seating.by_table:
        company.shrink(w, x, seating)
        return
    segments = seating.of(w.group)
    tails = x[:, w.k :]
    if not has_all(segments, seating, len(x)):
        tails.zero_()
    for s in segments:
        rank = s.adapter.rank
        columns = tails[s.start : s.stop, w.m * s.offset : w.m * (s.offset + rank)]
        shrink(x[s.start : s.stop, : w.k], w.a(s.offset, rank), s.adapter.scale, out=columns)


def forward(w: BorderedWeight, x: Tensor, seating: Seating, out: Tensor) -> Tensor:
    """``out [rows, N]`` from ``x [rows, K + p]`` whose tail is filled."""
    if seating.grouped:
        return company.expand(w, x, bordered_linear(x[:, : w.k], w.weight, bias=w.bias, out=out), seating)
    weight = w.forward_weight(seating.ranks_of(w.group))
    if seating.tile_rows and seating.of(w.group):
        spans = company.spans(w, w.k, seating, len(x))
        step = company.step(w, w.k, seating)
        return bordered_by_tile(x, weight, spans, k=w.k, tile_rows=seating.tile_rows, step=step, bias=w.bias, out=out)
    return bordered_linear(x, weight, bias=w.bias, out=out)


def backward(w: BorderedWeight, dy: Tensor, seating: Seating, out: Tensor) -> Tensor:
    """``out [rows, K]`` = dX from ``dy [rows, N + p]`` whose tail is filled."""
    if seating.grouped:
        return company.expand_gradient(w, dy, bordered_linear_backward(dy[:, : w.n], w.weight, out=out), seating)
    weight = w.backward_weight(seating.ranks_of(w.group))
    if seating.tile_rows and seating.of(w.group):
        spans = company.spans(w, w.n, seating, len(dy))
        step = company.step(w, w.n, seating)
        return bordered_by_tile_backward(dy, weight, spans, n=w.n, tile_rows=seating.tile_rows, step=step, out=out)
    return bordered_linear_backward(dy, weight, out=out)


def gradients(
    w: BorderedWeight, dy: Tensor, s_tail: Tensor, x: Tensor | None, seating: Seating, grads: Gradients
) -> None:
    """Fill the tail of ``dy`` [rows, N + p] with dS, and add dB_j = dY_jᵀ S_j and dA = dSᵀ X to ``grads``.

    ``s_tail`` [rows, p] is from the forward pass. Without ``x`` [rows, K] dA is left to :func:`accumulate_a`.
    """
    segments = seating.of(w.group)
    if seating.by_table:
        company.shrink_gradient(w, dy, seating)
        company.accumulate_b(w, dy, s_tail, seating, _first(w, seating, grads))
        if x is not None:
            accumulate_a(w, dy, x, seating, grads)
        return
    if len(segments) > 1 or any(s.adapter.rank < seating.ranks or s.stop - s.start < len(dy) for s in segments):
        dy[:, w.n :].zero_()
    for s in segments:
        rows, out, rank = slice(s.start, s.stop), grads[s.adapter.uid][w.group.name], s.adapter.rank
        columns = slice(w.m * s.offset, w.m * (s.offset + rank))
        lora_gradients(
            dy[rows, : w.n], s_tail[rows, columns], w.b(s.offset, rank), s.adapter.scale,
            ds=dy[rows, w.n :][:, columns], db=out.b, x=None if x is None else x[rows],
            da=None if x is None else out.a,
        )  # fmt: skip


def accumulate_a(w: BorderedWeight, dy: Tensor, x: Tensor, seating: Seating, grads: Gradients) -> None:
    """Add dA = dSᵀ X of every segment to ``grads``: ``dy [rows, N + p]`` with the tail filled, ``x [rows, K]``."""
    if seating.by_table:
        company.accumulate_a(w, dy, x, seating, _first(w, seating, grads))
        return
    for s in seating.of(w.group):
        columns = slice(w.n + w.m * s.offset, w.n + w.m * (s.offset + s.adapter.rank))
        rows = slice(s.start, s.stop)
        outer_accumulate(dy[rows, columns], x[rows], grads[s.adapter.uid][w.group.name].a)


def _first(w: BorderedWeight, seating: Seating, grads: Gradients) -> list[Tensor]:
    return [grads[s.adapter.uid][w.group.name].a for s in seating.of(w.group)]
