"""Plain torch, one product after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mint_engine.kernels.grouped_linear import LinearTable, OuterTable


def grouped_linear(x: Tensor, weight: Tensor, out: Tensor, table: LinearTable, add: bool) -> None:
    for p in table.products:
        w = torch.as_strided(weight, (p.n, p.depth), (p.w_out, p.w_in), weight.storage_offset() + p.offset)
        rows = slice(p.start, p.start + p.rows)
        product = p.scale * torch.mm(x[rows, p.x_col : p.x_col + p.depth], w.T)
        target = out[rows, p.out_col : p.out_col + p.n]
        target.copy_(target + product if add else product)


def grouped_outer(a: Tensor, b: Tensor, outs: Sequence[Tensor], table: OuterTable) -> None:
    for r in table.products:
        rows, out = slice(r.start, r.start + r.rows), outs[r.which]
        target = torch.as_strided(out, (r.p, r.q), (r.stride, 1), out.storage_offset() + r.offset)
        left, right = a[rows, r.a_col : r.a_col + r.p], b[rows, r.b_col : r.b_col + r.q]
        target.addmm_(left.to(out.dtype).T, right.to(out.dtype))
