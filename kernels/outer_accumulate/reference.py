"""The adapter gradients' product in plain torch."""

from __future__ import annotations

import torch


def outer_accumulate(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
    out.addmm_(a.to(out.dtype).T, b.to(out.dtype), alpha=alpha)
