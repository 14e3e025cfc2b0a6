"""swiglu and its gradient."""

from __future__ import annotations

import pytest
import torch
from check import chained, normal, poisoned, strided, surroundings_untouched, within_budget

from mint_engine.kernels import Shrink, swiglu, swiglu_backward

SHAPES = [(1, 1), (3, 63), (5, 100), (2, 2000), (40, 768)]


def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_matches_float64(face: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = normal(shape[0], 2 * shape[1], seed=1, dtype=dtype, scale=3.0)
    out = poisoned(*shape, dtype)
    assert swiglu(strided(gate_up), out=out, face=face) is out
    assert surroundings_untouched(out)
    within_budget("a", out, plain_swiglu(gate_up.double()), plain_swiglu(gate_up))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_matches_float64_autograd(face: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    m, f = shape
    gate_up = normal(m, 2 * f, seed=1, dtype=dtype, scale=3.0)
    da = normal(m, f, seed=2, dtype=dtype)

    def gradient(to: torch.dtype) -> torch.Tensor:
        leaf = gate_up.to(to, copy=True).requires_grad_()
        plain_swiglu(leaf).backward(da.to(to))
        assert leaf.grad is not None
        return leaf.grad

    dgate_up, a = poisoned(m, 2 * f, dtype), poisoned(m, f, dtype)
    got = swiglu_backward(strided(da), strided(gate_up), dgate_up=dgate_up, a=a, face=face)
    assert got[0] is dgate_up
    assert got[1] is a
    assert surroundings_untouched(dgate_up)
    assert surroundings_untouched(a)
    within_budget("dgate_up", dgate_up, gradient(torch.float64), gradient(dtype))
    within_budget("a", a, plain_swiglu(gate_up.double()), plain_swiglu(gate_up))


@pytest.mark.parametrize("rank", [5, 16, 50])
@pytest.mark.parametrize("shape", [(3, 63), (37, 768), (70, 101)])
def test_an_adapters_s_comes_with_it(face: str, dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    gate_up = normal(shape[0], 2 * shape[1], seed=1, dtype=dtype)
    a = normal(rank, shape[1], seed=7, dtype=dtype, scale=0.1)
    buffer = poisoned(shape[0], shape[1] + rank, dtype)
    out, s = buffer[:, : shape[1]], buffer[:, shape[1] :]
    swiglu(strided(gate_up), out=out, shrink=Shrink(strided(a), 0.5, s), face=face)
    within_budget("a", out, plain_swiglu(gate_up.double()), plain_swiglu(gate_up))
    within_budget("s", s, 0.5 * out.double() @ a.double().T, 0.5 * chained(out, a))


def test_extreme_gates_saturate_without_nan(face: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-3e38, -1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4], dtype=dtype)
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    a = swiglu(gate_up, face=face)[0]
    assert a.isfinite().all()
    assert (a[:3] == 0).all()
    assert (a[-3:] == gate[-3:]).all()


def test_nan_and_inf_propagate(face: str, dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[float("nan"), float("inf"), 1.0, 1.0, 1.0, float("nan")]], dtype=dtype)
    a = swiglu(gate_up, face=face)[0]
    assert a[0].isnan()
    assert a[1].isposinf()
    assert a[2].isnan()


def test_error_is_a_few_ulp_over_the_whole_range(face: str) -> None:
    # Relative, so that tails count as much as the middle.
    gate = torch.linspace(-80, 80, 20011)
    a = swiglu(torch.cat([gate, torch.ones_like(gate)])[None], face=face)[0].double()
    exact = gate.double() * torch.sigmoid(gate.double())
    ulp = ((a - exact).abs() / exact.abs().clamp(min=1e-30)).max() / 2**-23
    # Half an ulp for each of add, divide and product, and exp's own 1-2. A GPU's exp rounds x log2 e first.
    assert ulp < (4.0 + 40.0 if gate.is_cuda else 4.0)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="gate_up: expected an even number of columns, got 7"):
        swiglu(torch.zeros(2, 7))
