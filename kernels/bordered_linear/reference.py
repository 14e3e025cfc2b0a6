"""Plain torch: the specification of the bordered linear, right in float64."""

import torch
from torch import Tensor


def shrink(x: Tensor, a: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.mul(torch.mm(_alone(x), a.T), scale, out=out)


def bordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    x = _alone(x)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def bordered_linear_backward(dy: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return torch.mm(_alone(dy), weight, out=out)


def expand_backward(dy: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.mul(torch.mm(_alone(dy), b), scale, out=out)


def _alone(x: Tensor) -> Tensor:
    """``x`` without what lies beside it, where torch (2.13, oneDNN with AMX) would multiply that too: it reads a bf16
    row up to a multiple of 32 columns, and a NaN beyond its end times zero is NaN.
    """
    return x.contiguous() if x.is_cpu and x.dtype is torch.bfloat16 and x.shape[1] % 32 else x


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What the bordered form must equal: ``x Wᵀ + s (x Aᵀ) Bᵀ`` (LoRA, arXiv:2106.09685). The oracle of the tests."""
    return x @ weight.T + scale * (x @ a.T) @ b.T
