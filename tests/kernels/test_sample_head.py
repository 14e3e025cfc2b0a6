"""sample_head: the tokens that sample_rows draws from the same logits, which it never keeps."""

from __future__ import annotations

import pytest
import torch
from check import normal, strided
from torch import Tensor

from mint_engine.kernels import sample_head
from mint_engine.kernels.sample_rows import reference


def expected(x: Tensor, weight: Tensor, temperature: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, of the same numbers."""
    off = torch.full((len(x),), -1), torch.ones(len(x), dtype=torch.float64)
    return reference.sample_rows(x.double() @ weight.double().T, temperature, *off, uniforms)


def draws(rows: int) -> tuple[Tensor, Tensor]:
    temperature = torch.tensor([1.0, 0.0, 0.7, 2.0]).repeat(rows // 4 + 1)[:rows]
    return temperature, torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(("rows", "vocab", "k"), [(1, 1, 2), (3, 63, 16), (17, 1000, 72), (40, 2051, 130)])
def test_tokens_are_those_of_the_logits(face: str, dtype: torch.dtype, rows: int, vocab: int, k: int) -> None:
    x, weight = normal(rows, k, seed=1, dtype=dtype), normal(vocab, k, seed=2, dtype=dtype, scale=2 / k**0.5)
    temperature, uniforms = draws(rows)
    tokens, logprobs = sample_head(strided(x), strided(weight), temperature, uniforms, face=face)
    exact, exact_logprobs = expected(x, weight, temperature, uniforms)
    assert torch.equal(tokens, exact)
    assert (logprobs - exact_logprobs).abs().max() < 1e-5


def test_frequencies_are_the_softmax(face: str) -> None:
    """Evenly spaced uniforms: exact to one row."""
    x, weight, n = normal(1, 16, seed=3).expand(200, -1).contiguous(), normal(150, 16, seed=4, scale=0.5), 200
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = sample_head(x, weight, torch.full((n,), 0.8), uniforms, face=face)
    exact = torch.softmax((x[0].double() @ weight.double().T) / 0.8, 0)
    assert (torch.bincount(tokens, minlength=150) / n - exact).abs().max() <= 1.01 / n
    assert (tokens.diff() >= 0).all()


def test_a_row_is_drawn_alike_alone_and_in_company(face: str) -> None:
    x, weight = normal(5, 64, seed=5), normal(700, 64, seed=6, scale=0.3)
    temperature, uniforms = draws(5)
    together = sample_head(x, weight, temperature, uniforms, face=face)[0]
    alone = [
        sample_head(x[i : i + 1], weight, temperature[i : i + 1], uniforms[i : i + 1], face=face)[0] for i in range(5)
    ]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_and_equal_logits(face: str, uniform: float) -> None:
    weight = torch.full((300, 2), -400.0)  # e^-920 is 0 in float64 too
    weight[[70, 200, 299]] = 60.0
    x, u = torch.ones(2, 2), torch.full((2,), uniform, dtype=torch.float64)
    tokens, logprobs = sample_head(x, weight, torch.tensor([1.0, 0.0]), u, face=face)
    assert tokens.tolist() == [70 if uniform == 0 else 299, 70]
    assert (logprobs + torch.tensor(3.0).log()).abs().max() < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution_shows_and_harms_nobody(face: str, bad: float) -> None:
    x, weight = normal(3, 8, seed=7), normal(100, 8, seed=8).abs()
    x[1] = bad
    temperature, uniforms = torch.tensor([1.0, 1.0, 0.0]), torch.full((3,), 0.5, dtype=torch.float64)
    tokens, logprobs = sample_head(x, weight, temperature, uniforms, face=face)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert tokens[1] == 0


def test_arguments_that_do_not_fit_are_named() -> None:
    x, one = torch.zeros(2, 4), (torch.ones(2), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight: expected \[V, 4\], V >= 1, got \[0, 4\] \(sample_head\)"):
        sample_head(x, torch.zeros(0, 4), *one)
    with pytest.raises(ValueError, match=r"weight: expected torch.float32 \[3, 4\], got torch.float32 \[3, 5\]"):
        sample_head(x, torch.zeros(3, 5), *one)
    with pytest.raises(ValueError, match=r"uniforms: expected torch.float64 \[2\], got torch.float64 \[1\]"):
        sample_head(x, torch.zeros(3, 4), one[0], one[1][:1])
