"""rms_norm and its gradient."""

from __future__ import annotations

import pytest
import torch
from check import chained, normal, poisoned, strided, surroundings_untouched, within_budget

from mint_engine.kernels import Shrink, rms_norm, rms_norm_backward

EPS = 1e-5
SHAPES = [(1, 1), (3, 63), (5, 100), (2, 2000), (40, 576), (70, 1024)]


def plain_norm(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_forward_matches_float64(face: str, dtype: torch.dtype, shape: tuple[int, int], with_residual: bool) -> None:
    x, residual, weight = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([shape, shape, shape[1:]]))
    h_exact = x + residual if with_residual else x  # the op rounds the sum to the dtype: so does the oracle
    y, h = poisoned(*shape, dtype), poisoned(*shape, dtype) if with_residual else None
    got, h = rms_norm(
        strided(x), weight, EPS, residual=strided(residual) if with_residual else None, y=y, h=h, face=face
    )
    assert got is y
    assert surroundings_untouched(y)
    torch.testing.assert_close(h, h_exact, rtol=0, atol=0)
    within_budget("y", y, plain_norm(h_exact.double(), weight.double()), plain_norm(h_exact, weight))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_skip", [False, True])
def test_gradient_matches_float64_autograd(
    face: str, dtype: torch.dtype, shape: tuple[int, int], with_skip: bool
) -> None:
    dy, h, weight, skip = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([shape, shape, shape[1:], shape]))

    def gradient(to: torch.dtype) -> torch.Tensor:
        leaf = h.to(to, copy=True).requires_grad_()
        plain_norm(leaf, weight.to(to)).backward(dy.to(to))
        assert leaf.grad is not None
        return leaf.grad + skip.to(to) if with_skip else leaf.grad

    got = rms_norm_backward(
        strided(dy), strided(h), weight, EPS, dresidual=strided(skip) if with_skip else None, face=face
    )
    within_budget("dh", got, gradient(torch.float64), gradient(dtype))


@pytest.mark.parametrize("rank", [5, 16, 50])
@pytest.mark.parametrize("shape", [(3, 63), (37, 576), (70, 101)])
def test_an_adapters_s_comes_with_it(face: str, dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    x, residual, weight = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([shape, shape, shape[1:]]))
    a = normal(rank, shape[1], seed=7, dtype=dtype, scale=0.1)
    buffer = poisoned(shape[0], shape[1] + rank, dtype)
    y, s = buffer[:, : shape[1]], buffer[:, shape[1] :]
    rms_norm(strided(x), weight, EPS, residual=residual, y=y, shrink=Shrink(strided(a), 0.5, s), face=face)
    plain, _ = rms_norm(x, weight, EPS, residual=residual, face="reference")
    within_budget("y", y, plain_norm((x + residual).double(), weight.double()), plain)
    within_budget("s", s, 0.5 * y.double() @ a.double().T, 0.5 * chained(y, a))


def test_a_gradient_may_be_written_over_the_one_it_is_added_to(face: str, dtype: torch.dtype) -> None:
    dy, h, weight, skip = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(5, 100)] * 2 + [(100,), (5, 100)]))
    apart = rms_norm_backward(dy, h, weight, EPS, dresidual=skip, face=face)
    assert rms_norm_backward(dy, h, weight, EPS, dresidual=skip, dh=skip, face=face) is skip
    assert torch.equal(skip, apart)


def test_a_nan_stays_in_its_row(face: str, dtype: torch.dtype) -> None:
    x = normal(4, 100, seed=0, dtype=dtype)
    x[2, 7] = float("nan")
    y, _ = rms_norm(x, torch.ones(100, dtype=dtype), EPS, face=face)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


def test_no_rows_is_no_work(face: str, dtype: torch.dtype) -> None:
    y, _ = rms_norm(torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype), EPS, face=face)
    assert y.shape == (0, 8)


def test_a_wrong_weight_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight: expected torch.float32 \[8\], got torch.float32 \[7\] \(rms_norm\)"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), EPS)
