"""Many adapters in one Triton GEMM (`bordered_linear/triton.py`): its last tiles of K are the tile of rows' own border.

A pass with many adapters does the work of a pass with one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels.bordered_linear.triton import matmul
from mint_engine.kernels.triton_common import triton_reason


def supports(x: Tensor, *rest: Tensor | None) -> str | None:
    """Why this face cannot run on these tensors, or None. The int32 one is the table of spans."""
    for t in rest:
        if t is not None and t.dtype is torch.int32 and t.device != x.device:
            return f"mixed devices {x.device} and {t.device}"
    return triton_reason(x, *(t for t in rest if t is None or t.dtype is not torch.int32))


def bordered_by_tile(x: Tensor, weight: Tensor, spans: Tensor, k: int, tile_rows: int, bias: Tensor | None) -> Tensor:
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    return matmul(x, weight.T, y, k=k, bias=bias, spans=spans, tile_rows=tile_rows)


def bordered_by_tile_backward(dy: Tensor, weight: Tensor, spans: Tensor, n: int, tile_rows: int) -> Tensor:
    dx = torch.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype, device=dy.device)
    return matmul(dy, weight, dx, k=n, spans=spans, tile_rows=tile_rows)
