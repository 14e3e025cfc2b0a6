"""RMSNorm in plain torch."""

from __future__ import annotations

import torch

from mint_engine.kernels.args import statistics_dtype
from mint_engine.kernels.bordered_linear import Shrink


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    h: torch.Tensor,
    shrink: Shrink | None,
) -> None:
    if residual is not None:
        h.copy_(x + residual)
    wide = h.to(statistics_dtype(x.dtype))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y.copy_(wide * r * weight.to(wide.dtype))
    if shrink is not None:
        shrink.s.copy_(shrink.scale * (y.to(wide.dtype) @ shrink.a.to(wide.dtype).T))


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dresidual: torch.Tensor | None,
    dh: torch.Tensor,
) -> None:
    wide = h.to(statistics_dtype(h.dtype))
    g = dy.to(wide.dtype) * weight.to(wide.dtype)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = r * (g - wide * (r * r * (g * wide).mean(-1, keepdim=True)))
    dh.copy_(out if dresidual is None else out + dresidual.to(wide.dtype))
