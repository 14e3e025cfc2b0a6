"""The adapters of a pass that several share: many small products, each on its own rows, in one call.

With more than a few adapters in a pass, border columns (`bordered_linear`) would multiply every row with every adapter.
Here each adapter meets its own rows only: ``y[rows] += S[rows] @ Bᵀ`` after the base's GEMM, and so on.

A table says which products; it is made once per pass and shape of linear, and used for every layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.op import Op

__all__ = ["LinearTable", "Outer", "OuterTable", "Product", "grouped_linear", "grouped_outer"]

_op = Op("grouped_linear")


class Product(NamedTuple):
    """``out[start:start+rows, out_col:][:, :n] = scale * x[start:start+rows, x_col:][:, :depth] @ w.T``.

    Element (j, k) of ``w [n, depth]`` is element ``offset + j * w_out + k * w_in`` of the weight's buffer.
    """

    start: int
    rows: int
    x_col: int
    depth: int
    offset: int
    w_out: int
    w_in: int
    out_col: int
    n: int
    scale: float = 1.0


class Outer(NamedTuple):
    """``outs[which][offset + i * stride + j] += (a[start:start+rows, a_col:].T @ b[start:start+rows, b_col:])[i, j]``.

    For i < p and j < q; ``offset`` counts from the first element of that tensor.
    """

    which: int
    start: int
    rows: int
    a_col: int
    p: int
    b_col: int
    q: int
    offset: int
    stride: int


@dataclass(frozen=True)
class LinearTable:
    """Products with the shapes they were checked against: ``x [M, x_width]``, ``out [M, out_width]``, the buffer.

    ``made``: what a face has made of it, on its device: there as long as the table is, also for a captured launch.
    """

    products: tuple[Product, ...]
    shape: tuple[int, int, int, int]
    table: np.ndarray
    scales: np.ndarray
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(products: Sequence[Product], rows: int, x_width: int, out_width: int, buffer: int) -> LinearTable:
        """Raises ValueError if a product reaches beyond ``rows``, a width, or the buffer's number of elements."""
        for p in products:
            inside = (
                min(p[:9]) >= 0
                and p.start + p.rows <= rows
                and p.x_col + p.depth <= x_width
                and p.out_col + p.n <= out_width
                and (p.n * p.depth == 0 or p.offset + (p.n - 1) * p.w_out + (p.depth - 1) * p.w_in < buffer)
            )
            if not inside:
                raise ValueError(
                    f"products: expected them inside x [{rows}, {x_width}], out [{rows}, {out_width}] and a buffer of "
                    f"{buffer}, got {p} (grouped_linear)"
                )
        table = np.array([p[:9] for p in products], dtype=np.int64).reshape(-1, 9)
        scales = np.array([p.scale for p in products], dtype=np.float32)
        return LinearTable(tuple(products), (rows, x_width, out_width, buffer), table, scales)


@dataclass(frozen=True)
class OuterTable:
    """Products with the shapes they were checked against: ``a [M, a_width]``, ``b [M, b_width]``, how many outs.

    ``made``: as of `LinearTable`.
    """

    products: tuple[Outer, ...]
    shape: tuple[int, int, int, int]
    table: np.ndarray
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(products: Sequence[Outer], rows: int, a_width: int, b_width: int, outs: int) -> OuterTable:
        """Raises ValueError if a product reaches beyond ``rows``, a width, or names an output there is not."""
        for r in products:
            inside = (
                min(r) >= 0
                and r.which < outs
                and r.start + r.rows <= rows
                and r.a_col + r.p <= a_width
                and r.b_col + r.q <= b_width
            )
            if not inside:
                raise ValueError(
                    f"products: expected them inside a [{rows}, {a_width}], b [{rows}, {b_width}] and {outs} outputs, "
                    f"got {r} (grouped_outer)"
                )
        table = np.array(products, dtype=np.int64).reshape(-1, 9)
        return OuterTable(tuple(products), (rows, a_width, b_width, outs), table)


def grouped_linear(
    x: Tensor, weight: Tensor, out: Tensor, table: LinearTable, *, add: bool = False, face: str | None = None
) -> Tensor:
    """Every product of the table: ``out = scale * x @ w.T`` on its rows and columns, or with ``add`` ``out += ...``.

    ``x [M, Wx]``, ``out [M, Wo]`` and ``weight [..]``, a buffer without gaps, of one dtype; sums are fp32 and rounded
    once. ``x`` and ``out`` may be one tensor, as long as no product writes what another reads. Bytes moved: the rows of
    x and out and the weights of the products once.

    Raises:
        ValueError: a shape or dtype is not what the table was made for, or ``face`` cannot run.
    """
    rows, x_width, out_width, buffer = table.shape
    args.tensor("grouped_linear", "x", x, (rows, x_width), x.dtype)
    args.tensor("grouped_linear", "out", out, (rows, out_width), x.dtype)
    if weight.numel() != buffer or weight.dtype is not x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight: expected a contiguous buffer of {buffer} {x.dtype}, got {weight.dtype} {list(weight.shape)} "
            "(grouped_linear)"
        )
    _op.pick(face, x, weight, out).grouped_linear(x, weight, out, table, add)
    return out


def grouped_outer(a: Tensor, b: Tensor, outs: Sequence[Tensor], table: OuterTable, *, face: str | None = None) -> None:
    """Every product of the table, added in fp32 to the memory that begins with ``outs[which]``.

    ``a [M, Wa]`` and ``b [M, Wb]`` of one dtype; ``outs`` float32 (float64 for float64 inputs). That the memory behind
    an output is there, the table's maker answers for.

    Raises:
        ValueError: a shape or dtype is not what the table was made for, or ``face`` cannot run.
    """
    rows, a_width, b_width, count = table.shape
    args.tensor("grouped_outer", "a", a, (rows, a_width), a.dtype)
    args.tensor("grouped_outer", "b", b, (rows, b_width), a.dtype)
    if len(outs) != count or any(out.dtype is not args.statistics_dtype(a.dtype) for out in outs):
        raise ValueError(f"outs: expected {count} of {args.statistics_dtype(a.dtype)}, got {len(outs)} (grouped_outer)")
    _op.pick(face, a, b).grouped_outer(a, b, outs, table)
