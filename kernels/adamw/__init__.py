"""AdamW over one flat fp32 buffer, in place; with its result in the compute dtype where it is used, if asked for.

`adamw_norm` and `adamw_largest` are what must be known before a step; `write_places_` puts parameters where a step
would.
"""

from __future__ import annotations

import torch

from mint_engine.kernels import args
from mint_engine.kernels.adamw.places import Places
from mint_engine.kernels.op import Op

__all__ = [
    "Places",
    "adamw_",
    "adamw_largest",
    "adamw_norm",
    "adamw_places_",
    "hyperparameters",
    "write_places_",
]

_op = Op("adamw")


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    face: str | None = None,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019, arXiv:1711.05101), with torch.optim.AdamW's arithmetic.

    ``g = grad * grad_scale;  p *= 1 - lr * weight_decay;  m += (1 - beta1) (g - m);
    v = beta2 v + (1 - beta2) g^2;  p -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``.

    Args:
        param, exp_avg, exp_avg_sq: flat contiguous ``[n]`` float32 (the reference also takes float64), updated.
        grad: ``[n]`` of the same dtype, only read.
        lr, beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        step: t, 1 for the first step.
        grad_scale: multiplies the gradient first (clipping).
        face: run this face ("triton", "cpu", "reference") or raise.

    Bytes moved: 7 n elements.

    Raises:
        ValueError: a shape or dtype does not match, ``step`` < 1, or ``face`` cannot run.
    """
    n = param.numel()
    dtype = args.statistics_dtype(param.dtype)
    for name, t in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        args.tensor("adamw_", name, t, (n,), dtype)
    if step < 1:
        raise ValueError(f"step: expected 1 or more, got {step} (adamw_)")
    _op.pick(face, param, grad, exp_avg, exp_avg_sq).adamw_(
        param, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, grad_scale
    )


def hyperparameters(
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, grad_scale: float = 1.0
) -> tuple[float, ...]:
    """The eight numbers a step is made of and a 1, for `adamw_places_`. Differences near 1 are formed in float64."""
    if step < 1:
        raise ValueError(f"step: expected 1 or more, got {step} (adamw)")
    root, rate = (1.0 - beta2**step) ** -0.5, lr / (1.0 - beta1**step)
    return grad_scale, 1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, root, eps, rate, 1.0


def adamw_places_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    hyper: torch.Tensor,
    places: Places,
    *,
    face: str | None = None,
) -> float | None:
    """``adamw_``; each new parameter rounded to the compute dtype into its place in a border; ``grad`` emptied.

    The step's numbers are data on the device, so that a captured launch can be replayed with others; so is whether
    there is a step at all, so that what decides it need not have been seen by the host.

    Args:
        param, exp_avg, exp_avg_sq: as in ``adamw_``.
        grad: as in ``adamw_``; zero afterwards.
        hyper: ``[9]`` of the dtype of param, on its device: what `hyperparameters` gives. The last says what is done:
            1 the step, -1 gradients are emptied and nothing else, 0 nothing.
        places: where the elements go.
        face: run this face ("triton", "cpu", "reference") or raise.

    Returns:
        What ``adamw_largest`` says of the new parameters, if this face found it out in passing (the CPU's); else None.

    Bytes moved: 8 n elements of fp32 and n of the compute dtype.

    Raises:
        ValueError: a shape or dtype does not match, ``places`` are of another size, or ``face`` cannot run.
    """
    n, dtype = param.numel(), args.statistics_dtype(param.dtype)
    for name, t in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        args.tensor("adamw_places_", name, t, (n,), dtype)
    args.tensor("adamw_places_", "hyper", hyper, (9,), dtype)
    if places.size != n:
        raise ValueError(f"places: expected {n} elements, got {places.size} (adamw_places_)")
    run = _op.pick(face, param, grad, exp_avg, exp_avg_sq, hyper).adamw_places_
    largest: float | None = run(param, grad, exp_avg, exp_avg_sq, hyper, places)
    return largest


def write_places_(param: torch.Tensor, places: Places, *, face: str | None = None) -> None:
    """Each parameter, rounded to the compute dtype, into its place in a border: what a step does last.

    Args:
        param: flat contiguous ``[n]`` float32 (the reference also takes float64), only read.
        places: where the elements go.
        face: run this face ("triton", "cpu", "reference") or raise.

    Bytes moved: n elements of fp32 and n of the compute dtype.

    Raises:
        ValueError: the dtype does not match, ``places`` are of another size, or ``face`` cannot run.
    """
    args.tensor("write_places_", "param", param, (places.size,), args.statistics_dtype(param.dtype))
    _op.pick(face, param).write_places_(param, places)


def adamw_norm(grad: torch.Tensor, *, face: str | None = None) -> float:
    """The L2 norm of ``grad``, flat contiguous ``[n]`` float32: NaN or infinite if one of it is.

    Squares are summed in fp32 within blocks of 1024 and in float64 across them; the number of threads changes no bit.
    So values beyond 1e19 may make the norm infinite.

    Args:
        face: run this face ("triton", "cpu", "reference") or raise.

    Bytes moved: n elements.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    args.tensor("adamw_norm", "grad", grad, (grad.numel(),), torch.float32)
    return float(_op.pick(face, grad).adamw_norm(grad))


def adamw_largest(param: torch.Tensor, *, face: str | None = None) -> float:
    """The largest magnitude in ``param``, flat contiguous ``[n]`` float32: NaN if one of it is not finite.

    Args:
        face: run this face ("triton", "cpu", "reference") or raise.

    Bytes moved: n elements.

    Raises:
        ValueError: a shape or dtype does not match, or ``face`` cannot run.
    """
    args.tensor("adamw_largest", "param", param, (param.numel(),), torch.float32)
    return float(_op.pick(face, param).adamw_largest(param))
