"""AdamW in C++ (csrc/adamw.h)."""

from __future__ import annotations

import torch

from mint_engine.kernels.adamw.places import Places
from mint_engine.kernels.op import native
from mint_engine.kernels.op import native_reason as supports  # noqa: F401


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
    # Differences near 1 are formed here, in float64, and rounded to fp32 once.
    native.adamw(
        0, param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), param.numel(), grad_scale,
        1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** -0.5, eps, lr / (1 - beta1**step),
    )  # fmt: skip


def adamw_places_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    hyper: torch.Tensor,
    places: Places,
) -> None:
    state = (param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr())
    *numbers, what = hyper.tolist()
    if what > 0:
        native.adamw(0, *state, param.numel(), *numbers)
        for part, view in places.views:
            view.copy_(param[part].view(view.shape))
    if what:
        grad.zero_()
