"""A frozen linear layer and its LoRA adapters as single GEMMs over one bordered buffer.

For a frozen weight ``W [N, K]`` and an adapter ``A [r, K]``, ``B [N, r]``, scale ``s = alpha / r``, one buffer holds
``[[W, B], [A, 0]]`` with ``p`` border rows and columns. Then

    forward    S = s * X Aᵀ,   Y  = [X | S]   @ buf[:N, :K+p]ᵀ
    backward   dS = s * dY B,  dX = [dY | dS] @ buf[:N+p, :K]

are algebraically exact, cost ``p / K`` more FLOPs, move no extra memory and round once. ``S`` lives in the tail
columns of X's own buffer and ``dS`` in dY's. Several adapters take disjoint columns, with zeros in the rows of the
others. All tensors are 2-D with unit stride in the last dimension and any row stride; sums are fp32 inside the GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

__all__ = [
    "bordered_linear",
    "bordered_linear_backward",
    "expand_backward",
    "grouped_linear",
    "grouped_linear_backward",
    "shrink",
]

_op = Op("bordered_linear")


def shrink(x: Tensor, a: Tensor, scale: float, *, out: Tensor, face: str | None = None) -> Tensor:
    """``out[M, r] = scale * x[M, K] @ a[r, K]ᵀ``, in the working dtype.

    Raises ValueError if shapes or dtypes do not fit, or ``face`` cannot run. So do the other functions of this op.
    """
    (m, k), (r, _) = args.matrix("shrink", "x", x), args.matrix("shrink", "a", a)
    args.tensor("shrink", "a", a, (r, k), x.dtype)
    args.tensor("shrink", "out", out, (m, r), x.dtype)
    done: Tensor = _op.pick(face, x, a, out).shrink(x, a, scale, out)
    return done


def bordered_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, face: str | None = None) -> Tensor:
    """``y[M, N] = x[M, K+p] @ weight[N, K+p]ᵀ (+ bias[N])``: base and adapters in one GEMM.

    ``x`` carries S in its last p columns and ``weight`` carries B there. Bytes moved: x, weight and y once.
    """
    (_, k), (n, _) = args.matrix("bordered_linear", "x", x), args.matrix("bordered_linear", "weight", weight)
    args.tensor("bordered_linear", "weight", weight, (n, k), x.dtype)
    if bias is not None:
        args.tensor("bordered_linear", "bias", bias, (n,), x.dtype)
    y: Tensor = _op.pick(face, x, weight, bias).bordered_linear(x, weight, bias)
    return y


def bordered_linear_backward(dy: Tensor, weight: Tensor, *, face: str | None = None) -> Tensor:
    """``dx[M, K] = dy[M, N+p] @ weight[N+p, K]``.

    ``dy`` carries dS in its last p columns and ``weight`` A in its last p rows. Bytes moved: dy, weight and dx once.
    """
    (_, n), (_, k) = args.matrix("bordered_linear", "dy", dy), args.matrix("bordered_linear", "weight", weight)
    args.tensor("bordered_linear_backward", "weight", weight, (n, k), dy.dtype)
    dx: Tensor = _op.pick(face, dy, weight).bordered_linear_backward(dy, weight)
    return dx


def expand_backward(dy: Tensor, b: Tensor, scale: float, *, out: Tensor, face: str | None = None) -> Tensor:
    """``out[M, r] = scale * dy[M, N] @ b[N, r]``: the gradient of S."""
    (m, n), (_, r) = args.matrix("expand_backward", "dy", dy), args.matrix("expand_backward", "b", b)
    args.tensor("expand_backward", "b", b, (n, r), dy.dtype)
    args.tensor("expand_backward", "out", out, (m, r), dy.dtype)
    done: Tensor = _op.pick(face, dy, b, out).expand_backward(dy, b, scale, out)
    return done


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    spans: Tensor,
    *,
    k: int,
    tile_rows: int,
    bias: Tensor | None = None,
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
        spans: ``[ceil(M / tile_rows), 3]`` int32, contiguous, on the device of x, all multiples of 16 (for vector
            loads: pad ranks with zeros); w = 0 for rows without an adapter. A table that does not fit is refused on
            the CPU only: a GPU would have to be waited for.
        k: columns of the base.
        tile_rows: rows of a tile, a power of two, at least 16.
        bias: ``[N]`` or None.
        face: run this face or raise.

    Returns:
        ``y [M, N]``, rounded once.
    """
    args.matrix("grouped_linear", "x", x)
    n = args.matrix("grouped_linear", "weight", weight)[0]
    _check_spans("grouped_linear", x, weight, spans, k, tile_rows, weight.shape[1])
    if bias is not None:
        args.tensor("grouped_linear", "bias", bias, (n,), x.dtype)
    y: Tensor = _op.pick(face, x, weight, bias, spans).grouped_linear(x, weight, spans, k, tile_rows, bias)
    return y


def grouped_linear_backward(
    dy: Tensor, weight: Tensor, spans: Tensor, *, n: int, tile_rows: int, face: str | None = None
) -> Tensor:
    """``dx[i] = dy[i, :n] @ weight[:n] + dy[i, c:c+w] @ weight[b:b+w]`` with ``(c, b, w) = spans[i // tile_rows]``.

    ``dy [M, >= n]`` carries dS and ``weight [>= n, K]`` A, below W. Everything else as in ``grouped_linear``.
    """
    op = "grouped_linear_backward"
    args.matrix(op, "dy", dy)
    args.matrix(op, "weight", weight)
    _check_spans(op, dy, weight, spans, n, tile_rows, weight.shape[0])
    dx: Tensor = _op.pick(face, dy, weight, spans).grouped_linear_backward(dy, weight, spans, n, tile_rows)
    return dx


def _check_spans(op: str, x: Tensor, weight: Tensor, spans: Tensor, inner: int, tile_rows: int, end: int) -> None:
    """``end``: the length of the weight's inner dimension."""
    if weight.dtype is not x.dtype:
        raise ValueError(f"weight: expected {x.dtype}, got {weight.dtype} ({op})")
    if not 0 <= inner <= min(x.shape[1], end):
        raise ValueError(f"inner columns: expected 0 to {min(x.shape[1], end)}, got {inner} ({op})")
    if tile_rows < 16 or tile_rows & (tile_rows - 1):
        raise ValueError(f"tile_rows: expected a power of two of at least 16, got {tile_rows} ({op})")
    args.tensor(op, "spans", spans, (-(-x.shape[0] // tile_rows), 3), torch.int32)
    if not spans.is_contiguous():
        raise ValueError(f"spans: expected a contiguous tensor ({op})")
    if spans.is_cpu:
        for i, (source, border, width) in enumerate(spans.tolist()):
            outside = min(source, border, width) < 0 or source + width > x.shape[1] or border + width > end
            if outside or source % 16 or border % 16 or width % 16:
                raise ValueError(
                    f"spans: expected multiples of 16 within {x.shape[1]} and {end} columns, got {source}, {border} "
                    f"and a width of {width} in row {i} ({op})"
                )
