"""Plain torch: the specification of the bordered linear, right in float64."""

import torch
from torch import Tensor


def shrink(x: Tensor, a: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.mul(torch.mm(x, a.T), scale, out=out)


def bordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def bordered_linear_backward(dy: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return torch.mm(dy, weight, out=out)


def expand_backward(dy: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.mul(torch.mm(dy, b), scale, out=out)


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What the bordered form must equal: ``x Wᵀ + s (x Aᵀ) Bᵀ`` (LoRA, arXiv:2106.09685). The oracle of the tests."""
    return x @ weight.T + scale * (x @ a.T) @ b.T
