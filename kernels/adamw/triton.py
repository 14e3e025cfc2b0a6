"""AdamW in Triton: one pass over the flat buffers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mint_engine.kernels.triton_common import triton_reason

BLOCK = 1024


def supports(param: torch.Tensor, *rest: torch.Tensor) -> str | None:
    """Why this face cannot run on these tensors, or None."""
    return triton_reason(param, *rest)


@triton.jit
def _step(
    param, grad, exp_avg, exp_avg_sq, n, grad_scale, keep, new1, beta2, new2, root, eps, rate, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside, other=0.0) * grad_scale
    p = tl.load(param + at, mask=inside, other=0.0) * keep
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    p -= rate * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    tl.store(param + at, p, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)


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
    n = param.numel()
    if n:
        # Differences near 1 are formed here, in float64, and rounded to fp32 once.
        _step[(triton.cdiv(n, BLOCK),)](
            param, grad, exp_avg, exp_avg_sq, n, float(grad_scale), 1.0 - lr * weight_decay, 1.0 - beta1,
            float(beta2), 1.0 - beta2, (1.0 - beta2**step) ** -0.5, float(eps), lr / (1.0 - beta1**step),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
