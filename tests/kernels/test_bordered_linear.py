"""One GEMM over [[W, B], [A, 0]] is the frozen linear plus its LoRA adapter, forward and backward."""

from __future__ import annotations

import pytest
import torch
from check import normal, strided, within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine.kernels import bordered_linear, bordered_linear_backward, expand_backward, shrink
from mint_engine.kernels.bordered_linear.reference import lora_linear

SHAPES = [(1, 3, 5, 1), (3, 100, 63, 4), (8, 64, 96, 16), (9, 64, 96, 16), (33, 48, 130, 7)]  # rows, K, N, rank
SCALE = 1.5


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    m, k, n, r = shape
    return (
        normal(m, k, seed=1, dtype=dtype), normal(n, k, seed=2, dtype=dtype, scale=k**-0.5),
        normal(r, k, seed=3, dtype=dtype, scale=k**-0.5), normal(n, r, seed=4, dtype=dtype, scale=r**-0.5),
        normal(m, n, seed=5, dtype=dtype),
    )  # fmt: skip


def border(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    n, k = w.shape
    buf = torch.zeros(n + len(a), k + len(a), dtype=w.dtype)
    buf[:n, :k], buf[:n, k:], buf[n:, :k] = w, b, a
    return strided(buf)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_linear_plus_its_adapter(face: str, dtype: torch.dtype, shape: tuple, with_bias: bool) -> None:
    x, w, a, b, _ = problem(shape, dtype)
    m, k, n, r = shape
    bias = normal(n, seed=6, dtype=dtype) if with_bias else None
    buf, wide = border(w, a, b), strided(torch.zeros(m, k + r, dtype=dtype))
    wide[:, :k] = x
    shrink(wide[:, :k], buf[n:, :k], SCALE, out=wide[:, k:], face=face)
    y = bordered_linear(wide, buf[:n], bias=bias, face=face)

    def plain(to: torch.dtype) -> torch.Tensor:
        out = lora_linear(x.to(to), w.to(to), a.to(to), b.to(to), SCALE)
        return out if bias is None else out + bias.to(to)

    within_budget("y", y, plain(torch.float64), plain(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_gradient_of_the_input(face: str, dtype: torch.dtype, shape: tuple) -> None:
    x, w, a, b, dy = problem(shape, dtype)
    m, k, n, r = shape

    def gradient(to: torch.dtype) -> torch.Tensor:
        leaf = x.to(to, copy=True).requires_grad_()
        lora_linear(leaf, w.to(to), a.to(to), b.to(to), SCALE).backward(dy.to(to))
        assert leaf.grad is not None
        return leaf.grad

    buf, wide = border(w, a, b), strided(torch.zeros(m, n + r, dtype=dtype))
    wide[:, :n] = dy
    expand_backward(wide[:, :n], buf[:n, k:], SCALE, out=wide[:, n:], face=face)
    dx = bordered_linear_backward(wide, buf[:, :k], face=face)
    within_budget("dx", dx, gradient(torch.float64), gradient(dtype))


@settings(max_examples=30, deadline=None)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_adapters_side_by_side_do_not_mix(ranks: list[int], seed: int) -> None:
    """Rows of several adapters in one GEMM, each with S in its own columns and zeros elsewhere."""
    k, n, rows = 16, 24, 5
    x, w = (normal(*s, seed=seed).double() for s in ((rows * len(ranks), k), (n, k)))
    factors = [
        (normal(r, k, seed=seed + i).double(), normal(n, r, seed=seed - i).double()) for i, r in enumerate(ranks)
    ]
    buf = border(w, torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], 1))
    wide = torch.zeros(len(x), k + sum(ranks), dtype=torch.float64)
    wide[:, :k] = x
    column = k
    for i, r in enumerate(ranks):
        own = slice(i * rows, (i + 1) * rows)
        shrink(x[own], factors[i][0], SCALE, out=wide[own, column : column + r])
        column += r
    y = bordered_linear(wide, buf[:n])
    for i, (a, b) in enumerate(factors):
        own = slice(i * rows, (i + 1) * rows)
        torch.testing.assert_close(y[own], lora_linear(x[own], w, a, b, SCALE), atol=1e-12, rtol=1e-12)


def test_arguments_that_do_not_fit_are_named(face: str) -> None:
    x, w = torch.zeros(2, 4), torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"weight: expected torch.float32 \[3, 4\], got torch.float32 \[3, 5\]"):
        bordered_linear(x, w, face=face)
    with pytest.raises(ValueError, match=r"out: expected torch.float32 \[2, 3\]"):
        shrink(x, torch.zeros(3, 4), 1.0, out=torch.zeros(2, 2), face=face)
