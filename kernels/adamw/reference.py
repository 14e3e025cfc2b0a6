"""AdamW in plain torch."""

from __future__ import annotations

import torch

from mint_engine.kernels.adamw.places import Places


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    g = grad * grad_scale
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def adamw_places_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    hyper: torch.Tensor,
    places: Places,
) -> None:
    scale, keep, new1, beta2, new2, root, eps, rate, what = hyper
    g = grad * scale
    m = exp_avg + new1 * (g - exp_avg)
    v = exp_avg_sq * beta2 + new2 * g * g
    p = param * keep - rate * m / (v.sqrt() * root + eps)
    for old, new in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
        old.copy_(torch.where(what > 0, new, old))
    for part, view in places.views:
        view.copy_(torch.where(what > 0, param[part].view(view.shape).to(view.dtype), view))
    grad.masked_fill_(what != 0, 0.0)


def write_places_(param: torch.Tensor, places: Places) -> None:
    for part, view in places.views:
        view.copy_(param[part].view(view.shape))


def adamw_norm(grad: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(grad, dtype=torch.float64))


def adamw_largest(param: torch.Tensor) -> float:
    largest = torch.linalg.vector_norm(param, ord=torch.inf) if param.numel() else param.new_zeros(())
    return float(largest + 0.0 * largest)  # 0 * inf is NaN
