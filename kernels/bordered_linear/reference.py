"""Plain torch: the specification of the bordered linear, right in float64."""

import torch
from torch import Tensor


def shrink(x: Tensor, a: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.mul(torch.mm(x, a.T), scale, out=out)


def bordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


def bordered_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(dy, weight)


def expand_backward(dy: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.mul(torch.mm(dy, b), scale, out=out)


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What the bordered form must equal: ``x Wᵀ + s (x Aᵀ) Bᵀ`` (LoRA, arXiv:2106.09685). The oracle of the tests."""
    return x @ weight.T + scale * (x @ a.T) @ b.T


def _tile_sum(x: Tensor, base: Tensor, border: Tensor, spans: Tensor, k: int, tile_rows: int) -> Tensor:
    """``x[:, :k] @ base`` plus, for each tile of rows, the product of its own span with rows of ``border``."""
    out = torch.mm(x[:, :k], base)
    for i, (source, at, width) in enumerate(spans.tolist()):
        rows = slice(i * tile_rows, (i + 1) * tile_rows)
        # One product, so that the working dtype rounds once, as the fused GEMM does.
        inner = torch.cat([base, border[at : at + width]])
        out[rows] = torch.cat([x[rows, :k], x[rows, source : source + width]], dim=1) @ inner
    return out


def grouped_linear(x: Tensor, weight: Tensor, spans: Tensor, k: int, tile_rows: int, bias: Tensor | None) -> Tensor:
    y = _tile_sum(x, weight[:, :k].T, weight.T, spans, k, tile_rows)
    return y if bias is None else y + bias


def grouped_linear_backward(dy: Tensor, weight: Tensor, spans: Tensor, n: int, tile_rows: int) -> Tensor:
    return _tile_sum(dy, weight[:n], weight, spans, n, tile_rows)
