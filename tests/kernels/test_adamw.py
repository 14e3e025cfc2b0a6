"""adamw_ against torch.optim.AdamW in float64."""

from __future__ import annotations

import math

import pytest
import torch
from check import normal, within_budget

from mint_engine.kernels import Places, adamw_, adamw_largest, adamw_norm, adamw_places_, hyperparameters, write_places_

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


def test_the_step_goes_to_its_places_in_the_same_pass(face: str, dtype: torch.dtype) -> None:
    """A rows of a border, B columns, a piece that goes nowhere and one of no elements; each step has other numbers."""
    wide = torch.full((50, 130), torch.nan, dtype=dtype)
    a, b = wide[40:47, :100], wide[:37, 110:113]
    pieces = [(700, a), (1500, None), (0, None), (111, b)]
    places, n = Places(pieces, wide.device), 2311
    param = normal(n, seed=0)
    got = [param.clone(), torch.zeros(n), torch.zeros(n)]
    hyper, grads = torch.empty(9), [normal(n, seed=i + 1, scale=0.1) for i in range(10)]
    for i, g in enumerate(grads):
        hyper.copy_(torch.tensor(hyperparameters(**HYPER, step=i + 1, grad_scale=0.5)))
        emptied = g.clone()
        largest = adamw_places_(got[0], emptied, got[1], got[2], hyper, places, face=face)
        assert not emptied.any()
        assert largest == (float(got[0].abs().max()) if face == "cpu" else None)
    scaled = [g * 0.5 for g in grads]
    exact, plain = torch_steps(param.double(), scaled), torch_steps(param, scaled)
    for name, x, y, z in zip(("param", "exp_avg", "exp_avg_sq"), got, exact, plain, strict=True):
        within_budget(name, x, y, z)
    assert torch.equal(a, got[0][:700].view(7, 100).to(dtype))
    assert torch.equal(b, got[0][2200:].view(37, 3).to(dtype))
    assert int(wide.isnan().sum()) == wide.numel() - 811


def test_parameters_go_to_their_places_and_to_those_moved(face: str, dtype: torch.dtype) -> None:
    """More than a block of A rows and of B columns; where they go moves by other steps for either."""
    wide = torch.full((120, 230), torch.nan, dtype=dtype)
    pieces = [(2000, wide[60:80, :100]), (5, None), (1800, wide[:60, 110:140])]
    places, param = Places(pieces, wide.device), normal(3805, seed=0)
    moved = places.moved([20 * wide.stride(0), 0, 30])
    for chosen, row, column in ((places, 60, 110), (moved, 80, 140)):
        wide.fill_(torch.nan)
        write_places_(param, chosen, face=face)
        assert torch.equal(wide[row : row + 20, :100], param[:2000].view(20, 100).to(dtype))
        assert torch.equal(wide[:60, column : column + 30], param[2005:].view(60, 30).to(dtype))
        assert int(wide.isnan().sum()) == wide.numel() - 3800
    with pytest.raises(ValueError, match=r"param: expected torch.float32 \[3805\], got torch.float32 \[3804\]"):
        write_places_(param[1:], places, face=face)


@pytest.mark.parametrize("what", [0.0, -1.0])
def test_a_step_that_is_not_taken_moves_nothing_but_gradients(face: str, what: float) -> None:
    """Whatever the gradients and the numbers are: they are why it is not taken."""
    border = torch.full((7, 100), 3.0)
    state = [normal(900, seed=i) for i in range(4)]
    state[1][::7] = torch.inf
    before = [t.clone() for t in state]
    hyper = torch.tensor([*hyperparameters(**HYPER, step=3, grad_scale=float("nan"))[:-1], what])
    adamw_places_(*state, hyper, Places([(700, border), (200, None)], "cpu"), face=face)
    for i in (0, 2, 3):
        assert torch.equal(state[i], before[i])
    assert torch.equal(state[1], before[1] if what == 0 else torch.zeros(900))
    assert torch.equal(border, torch.full((7, 100), 3.0))


def test_places_that_do_not_fit_are_named() -> None:
    view = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"expected a view \[rows, columns\] of 5 elements .* got \[2, 3\]"):
        Places([(5, view[:2, :3])], "cpu")
    with pytest.raises(ValueError, match="expected views of one dtype"):
        Places([(24, view), (24, view.bfloat16())], "cpu")
    t = torch.zeros(9)
    with pytest.raises(ValueError, match="places: expected 9 elements, got 24"):
        adamw_places_(t, t, t, t, torch.zeros(9), Places([(24, view)], "cpu"))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_parameter_that_is_not_finite_after_the_step_is_told(broken: float) -> None:
    t = [normal(5000, seed=i).abs() for i in range(4)]
    t[0][4321] = broken
    largest = adamw_places_(
        *t, torch.tensor(hyperparameters(**HYPER, step=3)), Places([(5000, None)], "cpu"), face="cpu"
    )
    assert largest is not None
    assert math.isnan(largest)


def test_the_gradients_are_empty_after_the_step(face: str) -> None:
    t = [normal(5000, seed=i).abs() for i in range(4)]
    hyper = torch.tensor(hyperparameters(**HYPER, step=3))
    adamw_places_(*t, hyper, Places([(2000, None), (3000, None)], "cpu"), face=face)
    assert not t[1].any()
    assert bool((t[2] != 0).all())


@pytest.mark.parametrize("measuring", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("n", [1, 1000, 4096 + 17, 300001])
def test_norm_and_largest(measuring: str, n: int) -> None:
    grad, param = normal(n, seed=1, scale=1e-3), normal(n, seed=2)
    exact = float(grad.double().norm())
    assert abs(adamw_norm(grad, face=measuring) - exact) <= 2e-7 * exact
    assert adamw_largest(param, face=measuring) == float(param.abs().max())
    grad[-1] = torch.nan
    assert math.isnan(adamw_norm(grad, face=measuring))
    for broken in (torch.nan, torch.inf, -torch.inf):
        param[n // 2] = broken
        assert math.isnan(adamw_largest(param, face=measuring))


def test_of_nothing_norm_and_largest_are_zero() -> None:
    for face in ("cpu", "reference"):
        assert adamw_norm(torch.empty(0), face=face) == adamw_largest(torch.empty(0), face=face) == 0.0


def test_the_norm_does_not_depend_on_the_number_of_threads() -> None:
    grad, threads = normal(300001, seed=1), torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(adamw_norm(grad, face="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
