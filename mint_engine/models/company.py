"""The adapters' part of a linear in a pass that several share: each adapter meets its own rows only.

On a CPU ``y[rows] += S[rows] Bᵀ`` after the base's GEMM, instead of border columns inside it, which every row would
multiply; a GPU has each tile of rows look up its own, or does multiply them. The narrow products (S, dS, dA, dB) of all
adapters are one call each. S and dS of every adapter begin at the first column of the tail, or where it sits in the
border. The products of one kind of linear are the same in all layers: their tables are made once per pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mint_engine.borders import BorderedWeight, Seating, Segment
from mint_engine.device import upload
from mint_engine.kernels import grouped_linear, grouped_outer
from mint_engine.kernels.grouped_linear import LinearTable, Outer, OuterTable, Product

T = TypeVar("T")


def tail(w: BorderedWeight, seating: Seating) -> int:
    """Columns of S or dS: as many as the widest adapter needs; or all of theirs, side by side."""
    if seating.side_by_side:
        return w.m * seating.ranks_of(w.group)
    return w.m * max((s.adapter.rank for s in seating.of(w.group)), default=0)


def _at(w: BorderedWeight, s: Segment, seating: Seating) -> int:
    """The first of an adapter's columns of S or dS among those of the tail."""
    return w.m * s.offset if seating.side_by_side else 0


def shrink(w: BorderedWeight, x: Tensor, seating: Seating) -> None:
    """Fill the tail of ``x [rows, K + tail]`` with S = scale X Aᵀ.

    Columns that are not a row's own are zero where they are side by side, else as they were.
    """

    def table(segments: Sequence[Segment]) -> LinearTable:
        stride = w.buf.stride(0)
        return LinearTable.of(
            [
                Product(s.start, s.stop - s.start, 0, w.k, (w.n + w.m * s.offset) * stride, stride, 1,
                        w.k + _at(w, s, seating), w.m * s.adapter.rank, s.adapter.scale)
                for s in segments
            ],
            len(x), x.shape[1], x.shape[1], w.buf.numel(),
        )  # fmt: skip

    if seating.side_by_side:
        x[:, w.k :].zero_()
    grouped_linear(x, w.buf, x, _table("shrink", w, seating, table))


def expand(w: BorderedWeight, x: Tensor, y: Tensor, seating: Seating) -> Tensor:
    """Add S Bᵀ to ``y [rows, N]``."""

    def table(segments: Sequence[Segment]) -> LinearTable:
        return LinearTable.of(
            [
                Product(s.start, s.stop - s.start, w.k + j * r, r, offset, w.buf.stride(0), 1, row, n)
                for s in segments
                for j, row, n, r, offset in _factors_b(w, s)
            ],
            len(x), x.shape[1], y.shape[1], w.buf.numel(),
        )  # fmt: skip

    return grouped_linear(x, w.buf, y, _table("expand", w, seating, table), add=True)


def shrink_gradient(w: BorderedWeight, dy: Tensor, seating: Seating) -> None:
    """Fill the tail of ``dy [rows, N + tail]`` with dS = scale dY B, as :func:`shrink` does with S."""

    def table(segments: Sequence[Segment]) -> LinearTable:
        return LinearTable.of(
            [
                Product(s.start, s.stop - s.start, row, n, offset, 1, w.buf.stride(0),
                        w.n + _at(w, s, seating) + j * r, r, s.adapter.scale)
                for s in segments
                for j, row, n, r, offset in _factors_b(w, s)
            ],
            len(dy), dy.shape[1], dy.shape[1], w.buf.numel(),
        )  # fmt: skip

    if seating.side_by_side:
        dy[:, w.n :].zero_()
    grouped_linear(dy, w.buf, dy, _table("shrink_gradient", w, seating, table))


def expand_gradient(w: BorderedWeight, dy: Tensor, dx: Tensor, seating: Seating) -> Tensor:
    """Add dS A to ``dx [rows, K]``."""

    def table(segments: Sequence[Segment]) -> LinearTable:
        stride = w.buf.stride(0)
        return LinearTable.of(
            [
                Product(s.start, s.stop - s.start, w.n, w.m * s.adapter.rank,
                        (w.n + w.m * s.offset) * stride, 1, stride, 0, w.k)
                for s in segments
            ],
            len(dy), dy.shape[1], dx.shape[1], w.buf.numel(),
        )  # fmt: skip

    return grouped_linear(dy, w.buf, dx, _table("expand_gradient", w, seating, table), add=True)


def accumulate_a(w: BorderedWeight, dy: Tensor, x: Tensor, seating: Seating, outs: Sequence[Tensor]) -> None:
    """Add dA = dSᵀ X; ``outs`` are where each segment's dA begins, with its dB_j behind it."""

    def table(segments: Sequence[Segment]) -> OuterTable:
        return OuterTable.of(
            [
                Outer(i, s.start, s.stop - s.start, w.n + _at(w, s, seating), w.m * s.adapter.rank, 0, w.k, 0, w.k)
                for i, s in enumerate(segments)
            ],
            len(dy), dy.shape[1], x.shape[1], len(segments),
        )  # fmt: skip

    grouped_outer(dy, x, outs, _table("dA", w, seating, table))


def accumulate_b(w: BorderedWeight, dy: Tensor, s_tail: Tensor, seating: Seating, outs: Sequence[Tensor]) -> None:
    """Add dB_j = dY_jᵀ S_j; ``outs`` as in :func:`accumulate_a`."""

    def table(segments: Sequence[Segment]) -> OuterTable:
        return OuterTable.of(
            [
                Outer(i, s.start, s.stop - s.start, row, n, _at(w, s, seating) + j * r, r, w.m * r * w.k + row * r, r)
                for i, s in enumerate(segments)
                for j, row, n, r, _ in _factors_b(w, s)
            ],
            len(dy), dy.shape[1], s_tail.shape[1], len(segments),
        )  # fmt: skip

    grouped_outer(dy, s_tail, outs, _table("dB", w, seating, table))


def head_gradients(w: BorderedWeight, dx: Tensor, x: Tensor, seating: Seating, outs: Sequence[Tensor]) -> None:
    """dA += dSᵀ X and dX += dS A of the unembedding: ``dx`` [rows, K + p] has dS where S is in ``x`` [rows, K + p]."""
    segments, k = seating.of(w.group), w.k
    rows, stride = len(x), w.buf.stride(0)
    outer = [
        Outer(i, s.start, s.stop - s.start, k + s.offset, s.adapter.rank, 0, k, 0, k) for i, s in enumerate(segments)
    ]
    grouped_outer(dx, x, outs, OuterTable.of(outer, rows, dx.shape[1], x.shape[1], len(segments)))
    back = [
        Product(s.start, s.stop - s.start, k + s.offset, s.adapter.rank, (w.n + s.offset) * stride, 1, stride, 0, k)
        for s in segments
    ]
    grouped_linear(dx, w.buf, dx, LinearTable.of(back, rows, dx.shape[1], dx.shape[1], w.buf.numel()), add=True)


def spans(w: BorderedWeight, inner: int, seating: Seating, rows: int) -> Tensor:
    """What `kernels.bordered_by_tile` wants to know of each tile of rows, on the weight's device.

    ``inner``: columns of the base, behind which every tile's S (or dS) begins, and in the weight the B (or A) of all.
    """

    def table(segments: Sequence[Segment]) -> Tensor:
        out = torch.zeros(rows // seating.tile_rows, 3, dtype=torch.int32)
        for s in segments:
            tiles = slice(s.start // seating.tile_rows, s.stop // seating.tile_rows)
            out[tiles] = torch.tensor([inner, inner + w.m * s.offset, w.m * s.adapter.rank], dtype=torch.int32)
        return upload(out, w.buf.device)

    return _table(f"spans of {rows} rows from {inner}", w, seating, table)


def step(w: BorderedWeight, inner: int, seating: Seating) -> int:
    """What all entries of :func:`spans` are multiples of: 64, with which borders are whole tiles of K, or 16."""
    entries = [inner, *(w.m * n for s in seating.of(w.group) for n in (s.offset, s.adapter.rank))]
    return 64 if all(n % 64 == 0 for n in entries) else 16


def _factors_b(w: BorderedWeight, s: Segment) -> list[tuple[int, int, int, int, int]]:
    """(j, first row, rows, rank, offset in the buffer) of each B_j of the adapter."""
    out, row, rank = [], 0, s.adapter.rank
    for j, (_, n) in enumerate(w.group.modules):
        out.append((j, row, n, rank, row * w.buf.stride(0) + w.k + w.m * s.offset + j * rank))
        row += n
    return out


def _table(op: str, w: BorderedWeight, seating: Seating, make: Callable[[Sequence[Segment]], T]) -> T:
    """The op's table for linears of this kind, made on first use."""
    group = w.group
    key = (op, group.trained_by, group.in_features, tuple(n for _, n in group.modules))
    if key not in seating.tables:
        seating.tables[key] = make(seating.of(group))
    table: T = seating.tables[key]
    return table
