"""AdamW in C++ (csrc/adamw.h)."""

from __future__ import annotations

from array import array

import torch

from mint_engine.kernels.adamw.places import BLOCK, Places
from mint_engine.kernels.op import NATIVE_DTYPES, native
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
) -> float | None:
    *numbers, what = hyper.tolist()
    if what > 0:
        found = array("d", (0.0,))
        native.adamw_places(
            NATIVE_DTYPES[places.dtype], param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
            places.table.data_ptr(), len(places.table), BLOCK, *numbers,
            found.buffer_info()[0],
        )  # fmt: skip
        return found[0]
    if what:
        grad.zero_()
    return None


def write_places_(param: torch.Tensor, places: Places) -> None:
    native.write_places(
        NATIVE_DTYPES[places.dtype], param.data_ptr(), places.table.data_ptr(), len(places.table), BLOCK
    )


def adamw_norm(grad: torch.Tensor) -> float:
    found = array("d", (0.0,))
    native.adamw_norm(0, grad.data_ptr(), grad.numel(), found.buffer_info()[0])
    return found[0]


def adamw_largest(param: torch.Tensor) -> float:
    found = array("d", (0.0,))
    native.adamw_largest(0, param.data_ptr(), param.numel(), found.buffer_info()[0])
    return found[0]
