"""A frozen linear and the adapters of many tenants in one GEMM whose border is looked up for each tile of rows.

`bordered_linear` multiplies every row with every adapter of the pass: fine for a few. Here rows are grouped by adapter
(padded to a tile where need be), and a table gives each tile of rows the columns of the border that are its own:
DESIGN.md 2.1, "looking up the last K-tile's address per row tile".
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

__all__ = ["bordered_by_tile", "bordered_by_tile_backward"]

_op = Op("bordered_by_tile")


def bordered_by_tile(
    x: Tensor,
    weight: Tensor,
    spans: Tensor,
    *,
    k: int,
    tile_rows: int,
    step: int = 16,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    face: str | None = None,
) -> Tensor:
    """``bordered_linear`` for many adapters: each tile of rows reads its own columns of the border.

    With ``(c, b, w) = spans[i // tile_rows]``: ``y[i] = x[i, :k] @ weight[:, :k]ᵀ + x[i, c:c+w] @ weight[:, b:b+w]ᵀ
    (+ bias)``. So a pass of many adapters costs what one of their (largest) ranks costs, and S may be compact: every
    adapter's in the same columns of x (c = k), while B sits side by side in ``weight``. A tile whose rows are of two
    adapters needs their columns side by side in x too, zero in the other's rows, and a span over both.

    Args:
        x: ``[M, K']``, K' >= k, any row stride.
        weight: ``[N, K'']``, of the same dtype, any row stride.
        spans: ``[ceil(M / tile_rows), 3]`` int32, contiguous, on the device of x, all multiples of ``step`` (for
            vector loads: pad ranks with zeros); w = 0 for rows without an adapter. A table that does not fit is
            refused on the CPU only: a GPU would have to be waited for.
        k: columns of the base.
        tile_rows: rows of a tile, a power of two, at least 16.
        step: a multiple of 16. With 64 (ranks padded to 64, k a multiple of it) a Hopper loads whole tiles by TMA.
        bias: ``[N]`` or None.
        out: ``[M, N]`` to write into, or None.
        face: run this face or raise.

    Returns:
        ``y [M, N]``, rounded once.
    """
    args.matrix("bordered_by_tile", "x", x)
    n = args.matrix("bordered_by_tile", "weight", weight)[0]
    _check_spans("bordered_by_tile", x, weight, spans, k, tile_rows, step, weight.shape[1])
    out = args.writable("bordered_by_tile", "out", out, x, (x.shape[0], n))
    if bias is not None:
        args.tensor("bordered_by_tile", "bias", bias, (n,), x.dtype)
    _op.pick(face, x, weight, bias, out, spans).bordered_by_tile(x, weight, spans, k, tile_rows, step, bias, out)
    return out


def bordered_by_tile_backward(
    dy: Tensor,
    weight: Tensor,
    spans: Tensor,
    *,
    n: int,
    tile_rows: int,
    step: int = 16,
    out: Tensor | None = None,
    face: str | None = None,
) -> Tensor:
    """``dx[i] = dy[i, :n] @ weight[:n] + dy[i, c:c+w] @ weight[b:b+w]`` with ``(c, b, w) = spans[i // tile_rows]``.

    ``dy [M, >= n]`` carries dS and ``weight [>= n, K]`` A, below W. Everything else as in ``bordered_by_tile``.
    """
    op = "bordered_by_tile_backward"
    args.matrix(op, "dy", dy)
    k = args.matrix(op, "weight", weight)[1]
    _check_spans(op, dy, weight, spans, n, tile_rows, step, weight.shape[0])
    out = args.writable(op, "out", out, dy, (dy.shape[0], k))
    _op.pick(face, dy, weight, out, spans).bordered_by_tile_backward(dy, weight, spans, n, tile_rows, step, out)
    return out


def _check_spans(
    op: str, x: Tensor, weight: Tensor, spans: Tensor, inner: int, tile_rows: int, step: int, end: int
) -> None:
    """``end``: the length of the weight's inner dimension."""
    if weight.dtype is not x.dtype:
        raise ValueError(f"weight: expected {x.dtype}, got {weight.dtype} ({op})")
    if not 0 <= inner <= min(x.shape[1], end):
        raise ValueError(f"inner columns: expected 0 to {min(x.shape[1], end)}, got {inner} ({op})")
    if tile_rows < 16 or tile_rows & (tile_rows - 1):
        raise ValueError(f"tile_rows: expected a power of two of at least 16, got {tile_rows} ({op})")
    if step < 16 or step % 16:
        raise ValueError(f"step: expected a multiple of 16, got {step} ({op})")
    args.tensor(op, "spans", spans, (-(-x.shape[0] // tile_rows), 3), torch.int32)
    if not spans.is_contiguous():
        raise ValueError(f"spans: expected a contiguous tensor ({op})")
    if spans.is_cpu:
        for i, (source, border, width) in enumerate(spans.tolist()):
            outside = min(source, border, width) < 0 or source + width > x.shape[1] or border + width > end
            if outside or source % step or border % step or width % step:
                raise ValueError(
                    f"spans: expected multiples of {step} within {x.shape[1]} and {end} columns, got {source}, "
                    f"{border} and a width of {width} in row {i} ({op})"
                )
