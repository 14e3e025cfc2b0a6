"""All products of a table in one launch each: a program looks up which tile of which product is its own.

A product's sums run in one program, in the order of its rows or columns: no atomics, and its bits do not depend on the
rest of the table. What is made of a table on the device stays there as long as the table does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mint_engine.kernels.gpu_plan import Row, Tunable
from mint_engine.kernels.triton_common import UPCAST, architecture, dot, power_of_2
from mint_engine.kernels.triton_common import triton_reason as supports  # noqa: F401

if TYPE_CHECKING:
    from mint_engine.kernels.grouped_linear import LinearTable, OuterTable


def _linear_shared(row: Row, columns: int) -> int:
    return 2 * row["stages"] * row["BK"] * (row["BM"] + columns)


def _outer_shared(row: Row, narrow: int) -> int:
    return 2 * row["stages"] * row["BM"] * (row["BW"] + narrow)


LINEAR = Tunable(
    "grouped_linear.linear", {"BM": (32, 64, 128), "BK": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=(16, 32, 64, 128), shared=_linear_shared,
)  # fmt: skip
OUTER = Tunable(
    "grouped_linear.outer", {"BM": (32, 64, 128), "BW": (64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    cases=(16, 32, 64), shared=_outer_shared,
)  # fmt: skip


@triton.jit
def _linear(
    x, x_row, weight, out, out_row, table, scales, tiles,
    ADD: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``UNIT``: which stride of w is known to be 1, 1 for that of depth, 2 for that of columns, 0 for neither."""
    mine = tiles + tl.program_id(0) * 3
    number, tile_m, tile_n = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    entry = table + number * 9
    start, rows = tl.load(entry), tl.load(entry + 1)
    # What the alignment of a load and of its mask follows from.
    depth, n = tl.multiple_of(tl.load(entry + 3), ALIGN), tl.multiple_of(tl.load(entry + 8), ALIGN)
    x_col, offset = tl.multiple_of(tl.load(entry + 2), ALIGN), tl.multiple_of(tl.load(entry + 4), ALIGN)
    w_out, w_in = tl.multiple_of(tl.load(entry + 5), ALIGN), tl.multiple_of(tl.load(entry + 6), ALIGN)
    out_col = tl.multiple_of(tl.load(entry + 7), ALIGN)
    row, column, step = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    here, known = (row < rows)[:, None], (column < n)[None, :]
    at_row = (start + row)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, depth, BK):
        k = at + step
        inside = k < depth
        a = tl.load(x + at_row * x_row + x_col + k[None, :], mask=here & inside[None, :], other=0.0)
        along = k[:, None] if UNIT == 1 else k[:, None] * w_in
        across = column[None, :] if UNIT == 2 else column[None, :] * w_out
        b = tl.load(weight + offset + along + across, mask=inside[:, None] & known, other=0.0)
        acc = dot(a, b, acc, UPCAST)
    acc *= tl.load(scales + number)
    where = out + at_row * out_row + out_col + column[None, :]
    if ADD:
        acc += tl.load(where, mask=here & known, other=0.0).to(tl.float32)
    tl.store(where, acc.to(out.dtype.element_ty), mask=here & known)


@triton.jit
def _outer(
    wide, wide_row, narrow, narrow_row, addresses, table, tiles,
    SWAPPED: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile [BW, BN]; ``SWAPPED``: the wide operand is b, and the tile's transpose lies in out."""
    mine = tiles + tl.program_id(0) * 3
    number, tile_w, tile_n = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    entry = table + number * 9
    start, rows = tl.load(entry + 1), tl.load(entry + 2)
    a_col, p = tl.multiple_of(tl.load(entry + 3), ALIGN), tl.multiple_of(tl.load(entry + 4), ALIGN)
    b_col, q = tl.multiple_of(tl.load(entry + 5), ALIGN), tl.multiple_of(tl.load(entry + 6), ALIGN)
    i, j = tile_w * BW + tl.arange(0, BW), tile_n * BN + tl.arange(0, BN)
    inside_w, inside_n = (i < (q if SWAPPED else p))[None, :], (j < (p if SWAPPED else q))[None, :]
    from_w, from_n = (b_col if SWAPPED else a_col) + i[None, :], (a_col if SWAPPED else b_col) + j[None, :]
    acc = tl.zeros((BW, BN), tl.float32)
    for at in range(0, rows, BM):
        row = at + tl.arange(0, BM)
        inside, at_row = (row < rows)[:, None], (start + row)[:, None]
        w = tl.load(wide + at_row * wide_row + from_w, mask=inside & inside_w, other=0.0)
        n = tl.load(narrow + at_row * narrow_row + from_n, mask=inside & inside_n, other=0.0)
        acc = dot(tl.trans(w), n, acc, UPCAST)
    out = tl.load(addresses + tl.load(entry)).to(tl.pointer_type(tl.float32)) + tl.load(entry + 7)
    stride = tl.load(entry + 8)
    where = out + (i[:, None] + j[None, :] * stride if SWAPPED else i[:, None] * stride + j[None, :])
    mask = (i < (q if SWAPPED else p))[:, None] & (j < (p if SWAPPED else q))[None, :]
    tl.store(where, tl.load(where, mask=mask, other=0.0) + acc, mask=mask)


def _on_device(table: LinearTable | OuterTable, values: np.ndarray, device: torch.device) -> Tensor:
    key = values.dtype.str, values.tobytes(), device
    if key not in table.made:
        table.made[key] = torch.from_numpy(values.copy()).to(device)
    found: Tensor = table.made[key]
    return found


def _tiles(
    table: LinearTable | OuterTable, heights: np.ndarray, widths: np.ndarray, bm: int, bn: int, device: torch.device
) -> Tensor:
    """int32 ``[tiles, 3]``: product, tile of its rows, tile of its columns."""
    key = heights.tobytes(), widths.tobytes(), bm, bn, device
    if key not in table.made:
        rows = [
            (number, i, j)
            for number, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True))
            for i in range(-(-height // bm))
            for j in range(-(-width // bn))
        ]
        table.made[key] = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3).to(device)
    found: Tensor = table.made[key]
    return found


def _alignment(values: np.ndarray) -> int:
    """16, 8 or 1: what all these element offsets are multiples of."""
    common = gcd(*(int(v) for v in values.flat))
    return next(a for a in (16, 8, 1) if common % a == 0)


def grouped_linear(x: Tensor, weight: Tensor, out: Tensor, table: LinearTable, add: bool) -> None:
    columns = table.table
    if not len(columns):
        return
    rows, ns, inner, outer = columns[:, 1], columns[:, 8], columns[:, 6], columns[:, 5]
    unit = 1 if (inner == 1).all() else 2 if (outer == 1).all() else 0
    bn = LINEAR.case(power_of_2(int(ns.max()), 16))
    meta = LINEAR.meta(architecture(), bn)
    meta["BM"] = min(meta["BM"], power_of_2(int(rows.max()), 16))
    if x.dtype is torch.float32:  # for tests: twice as wide
        meta["num_stages"], meta["BK"] = 2, 32
    tiles = _tiles(table, rows, ns, meta["BM"], bn, x.device)
    if not len(tiles):
        return
    # A stride of 1 is not looked up where it is known.
    looked_up = [2, 3, 4, 7, 8, *([] if unit == 2 else [5]), *([] if unit == 1 else [6])]
    _linear[(len(tiles),)](
        x, x.stride(0), weight, out, out.stride(0), _on_device(table, columns, x.device),
        _on_device(table, table.scales, x.device), tiles, ADD=add, UNIT=unit,
        ALIGN=_alignment(columns[:, looked_up]), BN=bn, UPCAST=UPCAST, **meta,
    )  # fmt: skip


def grouped_outer(a: Tensor, b: Tensor, outs: Sequence[Tensor], table: OuterTable) -> None:
    columns = table.table
    if not len(columns):
        return
    ps, qs = columns[:, 4], columns[:, 6]
    narrow = OUTER.case(power_of_2(int(min(ps.max(), qs.max())), 16))
    meta = OUTER.meta(architecture(), narrow)
    wide = meta.pop("BW")
    if a.dtype is torch.float32:  # for tests: twice as wide
        meta["num_stages"], meta["BM"] = 2, min(meta["BM"], 32)
    swapped = bool(ps.max() < qs.max())
    widths, depths = (qs, ps) if swapped else (ps, qs)
    tiles = _tiles(table, widths, depths, wide, narrow, a.device)
    if not len(tiles):
        return
    addresses = np.array([out.data_ptr() for out in outs], dtype=np.int64)
    x, y = (b, a) if swapped else (a, b)
    _outer[(len(tiles),)](
        x, x.stride(0), y, y.stride(0), _on_device(table, addresses, a.device), _on_device(table, columns, a.device),
        tiles, SWAPPED=swapped,
        ALIGN=_alignment(columns[:, [3, 4, 5, 6]]), BW=wide, BN=narrow, UPCAST=UPCAST, **meta,
    )  # fmt: skip
