"""Plain torch, one tile of rows after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def _tile_sum(x: Tensor, base: Tensor, border: Tensor, spans: Tensor, k: int, tile_rows: int, out: Tensor) -> None:
    """``x[:, :k] @ base`` plus, for each tile of rows, the product of its own span with rows of ``border``."""
    for i, (source, at, width) in enumerate(spans.tolist()):
        rows = slice(i * tile_rows, (i + 1) * tile_rows)
        # One product, so that the working dtype rounds once, as the fused GEMM does.
        inner = torch.cat([base, border[at : at + width]])
        out[rows] = torch.cat([x[rows, :k], x[rows, source : source + width]], dim=1) @ inner


def bordered_by_tile(
    x: Tensor, weight: Tensor, spans: Tensor, k: int, tile_rows: int, step: int, bias: Tensor | None, out: Tensor
) -> None:
    _tile_sum(x, weight[:, :k].T, weight.T, spans, k, tile_rows, out)
    if bias is not None:
        out += bias


def bordered_by_tile_backward(
    dy: Tensor, weight: Tensor, spans: Tensor, n: int, tile_rows: int, step: int, out: Tensor
) -> None:
    _tile_sum(dy, weight[:n], weight, spans, n, tile_rows, out)
