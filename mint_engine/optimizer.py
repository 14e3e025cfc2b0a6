"""optim_step: Adam with bias correction and decoupled weight decay (AdamW, arXiv:1711.05101) on the fp32 masters."""

from __future__ import annotations

import math
from typing import Any

import torch

from mint_engine.adapters import Adapter, TrainState
from mint_engine.errors import NonFiniteError
from mint_engine.gpu.run import Programs, programs
from mint_engine.kernels import Places, adamw_places_, adamw_statistics, hyperparameters
from mint_engine.models.decoder import Decoder
from mint_engine.types import AdamParams, OptimStepResponse


def optim_step(
    adapter: Adapter, state: TrainState, params: AdamParams, decoder: Decoder | None = None
) -> OptimStepResponse:
    """Apply the accumulated gradients and zero them. Without gradients it is a step with zero gradients.

    ``grad_clip_norm`` > 0 clips by the global L2 norm first, as ``torch.nn.utils.clip_grad_norm_`` does.
    ``decoder``: the base model; its border is written too, if the adapter sits there.

    Raises:
        NonFiniteError: the gradient norm is not finite (the gradients are dropped), or the step would overflow fp32
            (they are kept). The adapter and the optimiser are as they were.
    """
    if decoder is not None and decoder.device.type == "cuda":
        with torch.no_grad(), torch.cuda.device(decoder.device):
            return step_within(programs(decoder), adapter, state, params)
    borders = None if decoder is None else decoder.borders
    offset = None if borders is None else borders.offset_of(adapter)
    places = Places([(adapter.params.numel(), None)], "cpu") if borders is None else borders.places(adapter, offset)
    norm, low, high = adamw_statistics(state.grads, adapter.params)
    numbers = hyperparameters(**_checked(norm, low, high, state, params))
    hyper = torch.tensor(numbers, dtype=torch.float32)
    adamw_places_(adapter.params, state.grads, state.exp_avg, state.exp_avg_sq, hyper, places)
    state.has_grads = False
    response = _done(adapter, state, norm)
    if borders is not None and offset is not None:
        borders.written(adapter, offset)
    return response


def step_within(found: Programs, adapter: Adapter, state: TrainState, params: AdamParams) -> OptimStepResponse:
    """What :func:`optim_step` does, by recorded launches (`gpu/stepper.py`)."""
    borders = found.borders
    offset, stepper = borders.offset_of(adapter), found.steppers.of(adapter, state)
    norm, low, high = stepper.statistics(adapter, state)
    numbers = _checked(norm, low, high, state, params)
    stepper.step(adapter, state, hyperparameters(**numbers))
    state.has_grads = False
    response = _done(adapter, state, norm)
    if offset is not None:
        borders.written(adapter, offset)
    return response


def _checked(norm: float, low: float, high: float, state: TrainState, params: AdamParams) -> dict[str, Any]:
    """The step's numbers as `kernels.hyperparameters` names them, if it may be done."""
    if not math.isfinite(norm):
        state.zero_grads()
        raise NonFiniteError(f"gradient: its norm is {norm}; the step was refused and the gradients were dropped")
    _check_overflow(low, high, params)
    clip = params.grad_clip_norm
    return {
        "lr": params.learning_rate, "beta1": params.beta1, "beta2": params.beta2, "eps": params.eps,
        "weight_decay": params.weight_decay, "step": state.step + 1,
        "grad_scale": min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0,
    }  # fmt: skip


def _done(adapter: Adapter, state: TrainState, norm: float) -> OptimStepResponse:
    state.step += 1
    adapter.version += 1
    return OptimStepResponse(metrics={"grad_norm": norm, "step": float(state.step)})


def _check_overflow(low: float, high: float, p: AdamParams) -> None:
    """Refuse a step whose result might not fit fp32, by the bound on Adam's update (arXiv:1412.6980, section 2.1)."""
    largest_update = p.learning_rate * max(1.0, (1 - p.beta1) / math.sqrt(1 - p.beta2))
    bound = max(-low, high) * max(1.0, abs(1 - p.learning_rate * p.weight_decay)) + largest_update
    if not bound < 1e35:  # a thousandth of fp32's range: the bound is loose when the betas change between steps
        raise NonFiniteError(
            f"optim_step: learning_rate {p.learning_rate} and weight_decay {p.weight_decay} could take weights to "
            f"{bound:.1e}, beyond fp32; the step was refused"
        )
