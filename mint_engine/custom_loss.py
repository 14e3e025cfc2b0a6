"""Losses written by the caller on log-probabilities (wire-protocol 5.7).

forward gives the log-probabilities, the caller's function a loss on them, autograd its gradient g; then cross-entropy
with weights -g, whose loss is Σ lp·g, has exactly the gradient of the caller's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mint_engine.errors import NonFiniteError, UserError
from mint_engine.types import Datum, ForwardBackwardOutput, TensorData

CustomLoss = Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, Mapping[str, float]]]


@dataclass(frozen=True)
class Evaluated:
    """The caller's loss, metrics, and the cross-entropy weights -dloss/dlogprob, one array per datum."""

    loss: float
    metrics: dict[str, float]
    weights: list[np.ndarray]


def with_weights(data: Sequence[Datum], weights: Sequence[np.ndarray] | None = None) -> list[Datum]:
    """The datums as cross-entropy takes them: their targets, with the weights given, or zeros.

    Raises:
        UserError: a datum has no target_tokens.
    """
    out = []
    for i, datum in enumerate(data):
        if "target_tokens" not in datum.loss_fn_inputs:
            raise UserError(f"loss_fn_inputs: forward_backward_custom needs target_tokens (datum {i})")
        targets = datum.loss_fn_inputs["target_tokens"]
        array = np.zeros(targets.to_numpy().shape, np.float32) if weights is None else weights[i]
        inputs = {"target_tokens": targets, "weights": TensorData.from_numpy(array)}
        out.append(Datum(model_input=datum.model_input, loss_fn_inputs=inputs))
    return out


def evaluate(fn: CustomLoss, data: list[Datum], outputs: Sequence[Mapping[str, TensorData]]) -> Evaluated:
    """Call the user's function and differentiate it. Whatever it raises reaches the caller's future.

    Raises:
        UserError: it does not return (scalar tensor, metrics).
        NonFiniteError: its loss or its gradient is not finite.
    """
    logprobs = [torch.from_numpy(out["logprobs"].to_numpy().copy()).requires_grad_() for out in outputs]
    with torch.enable_grad():
        returned: Any = fn(data, logprobs)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise UserError(f"loss_fn: expected (loss, metrics), got {type(returned).__name__}")
        loss, metrics = returned
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise UserError(
                f"loss_fn: expected a loss tensor of one element, got {getattr(loss, 'shape', type(loss).__name__)}"
            )
        if not loss.requires_grad:
            raise UserError("loss_fn: its loss does not depend on the log-probabilities, so there is nothing to train")
        gradients = torch.autograd.grad(loss.reshape(()), logprobs, allow_unused=True)
    weights = [
        np.zeros(lp.shape, np.float32) if g is None else -g.numpy() for lp, g in zip(logprobs, gradients, strict=True)
    ]
    value = float(loss.detach())
    if not math.isfinite(value) or not all(np.isfinite(w).all() for w in weights):
        raise NonFiniteError(f"loss_fn: its loss ({value}) or its gradient is not finite; the call was refused")
    return Evaluated(value, _numbers(metrics), weights)


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping | None):
        raise UserError(f"loss_fn: expected metrics as a dict of numbers, got {type(metrics).__name__}")
    numbers: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several elements
            raise UserError(f"loss_fn: expected metrics of numbers, got {value!r} as {name!r}") from error
    return numbers


def result(surrogate: ForwardBackwardOutput, evaluated: Evaluated) -> ForwardBackwardOutput:
    """The call's output: ``loss:sum`` is the caller's loss, ``surrogate_loss:sum`` the cross-entropy it became."""
    metrics = dict(surrogate.metrics)
    metrics["surrogate_loss:sum"] = metrics["loss:sum"]
    return replace(surrogate, metrics={**metrics, **evaluated.metrics, "loss:sum": evaluated.loss}, weight_sum=None)
