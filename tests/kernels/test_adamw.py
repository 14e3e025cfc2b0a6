"""adamw_ against torch.optim.AdamW in float64."""

from __future__ import annotations

import pytest
import torch
from check import normal, within_budget

from mint_engine.kernels import adamw_

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def torch_steps(param: torch.Tensor, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """[param, exp_avg, exp_avg_sq] after torch.optim.AdamW's steps, in the dtype of ``param``."""
    leaf = param.clone().requires_grad_()
    betas = (HYPER["beta1"], HYPER["beta2"])
    optimizer = torch.optim.AdamW(
        [leaf], lr=HYPER["lr"], betas=betas, eps=HYPER["eps"], weight_decay=HYPER["weight_decay"], foreach=False
    )
    for g in grads:
        leaf.grad = g.to(leaf.dtype)
        optimizer.step()
    state = optimizer.state[leaf]
    return [leaf.detach(), state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.parametrize("n", [1, 15, 100, 4096 + 17, 70001])
@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
def test_ten_steps_match_torch_adamw(face: str, n: int, grad_scale: float) -> None:
    param = normal(n, seed=0)
    grads = [normal(n, seed=i + 1, scale=0.1) for i in range(10)]
    got = [param.clone(), torch.zeros(n), torch.zeros(n)]
    for i, g in enumerate(grads):
        adamw_(got[0], g, got[1], got[2], **HYPER, step=i + 1, grad_scale=grad_scale, face=face)
    scaled = [g * grad_scale for g in grads]  # a power of two: exact
    exact, plain = torch_steps(param.double(), scaled), torch_steps(param, scaled)
    for name, a, b, c in zip(("param", "exp_avg", "exp_avg_sq"), got, exact, plain, strict=True):
        within_budget(name, a, b, c)


def test_zero_gradient_and_no_decay_leave_the_parameter_bitwise(face: str) -> None:
    param, zero = normal(100, seed=0), torch.zeros(100)
    before = param.clone()
    adamw_(param, zero, zero.clone(), zero.clone(), **{**HYPER, "weight_decay": 0.0}, step=1, face=face)
    assert torch.equal(param, before)


def test_a_step_counted_from_zero_is_refused() -> None:
    t = torch.zeros(3)
    with pytest.raises(ValueError, match="step: expected 1 or more, got 0"):
        adamw_(t, t, t, t, **HYPER, step=0)
