"""RMSNorm in plain torch."""

from __future__ import annotations

import torch

from mint_engine.kernels.args import statistics_dtype


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x if residual is None else x + residual
    wide = h.to(statistics_dtype(x.dtype))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y.copy_(wide * r * weight.to(wide.dtype))
    return y, h


def rms_norm_backward(
    dy: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, eps: float, dresidual: torch.Tensor | None
) -> torch.Tensor:
    wide = h.to(statistics_dtype(h.dtype))
    g = dy.to(wide.dtype) * weight.to(wide.dtype)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    dh = r * (g - wide * (r * r * (g * wide).mean(-1, keepdim=True)))
    if dresidual is not None:
        dh = dh + dresidual.to(wide.dtype)
    return dh.to(h.dtype)
