"""On the CPU a product for each tile: oneDNN through torch.mm, as in the reference.

The CPU's own way with many adapters adds their small products after one GEMM for all; this op is the GPU's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mint_engine.kernels.bordered_by_tile.reference import bordered_by_tile, bordered_by_tile_backward
from mint_engine.kernels.op import native_reason

__all__ = ["bordered_by_tile", "bordered_by_tile_backward", "supports"]


def supports(*tensors: Tensor | None) -> str | None:
    """Why this face cannot run on these tensors, or None. The int32 one is the table of spans."""
    return native_reason(*(t for t in tensors if t is None or t.dtype is not torch.int32))
