"""sample_rows and top_logprobs: against the distributions they stand for, and against the reference token by token."""

from __future__ import annotations

import pytest
import torch
from check import normal, strided
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mint_engine.kernels import sample_rows, top_logprobs

GRID = 800  # evenly spaced uniforms: frequencies are exact to 1/GRID, no statistics needed
VOCABS = [2, 7, 255, 256, 257, 600]


def draw(
    logits: Tensor, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0,
    uniforms: Tensor | None = None, face: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n = len(logits)
    u = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) if uniforms is None else uniforms
    return sample_rows(
        logits, torch.full((n,), temperature), torch.full((n,), top_k), torch.full((n,), top_p, dtype=torch.float64), u,
        face=face,
    )  # fmt: skip


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The filtered distribution, by sorting, in float64."""
    p = torch.softmax(logits.double() / temperature, -1)
    order = p.argsort(descending=True, stable=True)
    kept = torch.zeros(len(p), dtype=torch.bool)
    kept[order[: top_k if top_k >= 1 else len(p)]] = True
    if top_p < 1:
        sorted_p = (p * kept / (p * kept).sum())[order]
        kept[order[sorted_p.cumsum(0) - sorted_p >= top_p]] = False
    return p * kept / (p * kept).sum()


cases = given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from(VOCABS),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 1, 3, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
)
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@cases
def test_tokens_follow_the_filtered_distribution(face: str, seed, vocab, temperature, top_k, top_p) -> None:
    if face == "triton":
        pytest.skip("hundreds of rows in the interpreter; token by token below")
    logits = normal(vocab, seed=seed, scale=2.0)
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens, _ = draw(logits.expand(GRID, -1).contiguous(), temperature, top_k, top_p, uniforms, face)
    exact = distribution(logits, temperature, top_k, top_p)
    got = torch.bincount(tokens, minlength=vocab) / GRID
    assert (got[exact == 0] == 0).all()
    assert (got - exact).abs().max() <= 1.01 / GRID


def test_a_hundred_thousand_draws_pass_chi_squared(face: str) -> None:
    if face in ("reference", "triton"):
        pytest.skip("a Python loop over rows; its frequencies are exact on the grid")
    logits, n = normal(40, seed=5, scale=1.5), 100_000
    for temperature, top_k, top_p in ((1.0, -1, 1.0), (0.7, 20, 1.0), (1.3, -1, 0.8), (1.0, 25, 0.9)):
        uniforms = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(top_k))
        tokens, _ = draw(logits.expand(n, -1).contiguous(), temperature, top_k, top_p, uniforms, face)
        expected = distribution(logits, temperature, top_k, top_p) * n
        seen = torch.bincount(tokens, minlength=40).double()
        assert (seen[expected == 0] == 0).all()
        kept = expected > 0
        chi = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
        freedom = int(kept.sum()) - 1
        assert chi < freedom + 4 * (2 * freedom) ** 0.5 + 8, (temperature, top_k, top_p)  # about 1 in 10^5


@quick
@cases
def test_logprobs_are_tempered_and_the_filters_do_not_renormalise_them(
    face: str, seed, vocab, temperature, top_k, top_p
) -> None:
    if face == "triton":
        pytest.skip("hundreds of rows in the interpreter; token by token below")
    logits = normal(9, vocab, seed=seed, scale=3.0)
    tokens, logprobs = draw(strided(logits), temperature, top_k, top_p, face=face)
    exact = torch.log_softmax(logits.double() / temperature, -1).gather(1, tokens[:, None])[:, 0]
    assert (logprobs - exact).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [1, 2, 257, 4999])
def test_rows_of_every_kind_match_the_reference(face: str, vocab: int) -> None:
    """Logits that repeat: filters end among entries that are alike."""
    kinds = [(t, k, p) for t in (0.0, 0.3, 1.0, 2.0) for k in (-1, 1, 3, 40) for p in (1.0, 0.9, 0.3, 0.0)]
    if face == "triton" and vocab > 2:
        kinds = kinds[::5]  # slow in the interpreter; five passes through each value in other company
    temperature, top_k, top_p = (torch.tensor(values, dtype=torch.float64) for values in zip(*kinds, strict=True))
    logits = (normal(len(kinds), vocab, seed=vocab, scale=2.0) * 4).round() / 4
    uniforms = torch.rand(len(kinds), dtype=torch.float64, generator=torch.Generator().manual_seed(vocab))
    arguments = temperature.float(), top_k.long(), top_p, uniforms
    got, expected = (sample_rows(strided(logits), *arguments, face=f) for f in (face, "reference"))
    assert torch.equal(got[0], expected[0])
    assert (got[1] - expected[1]).abs().max() < 1e-5


def test_a_large_vocabulary_matches_the_reference(face: str) -> None:
    """A real head's size, where bins and blocks are many; logits that repeat, as bf16 activations make them."""
    rows = 1 if face == "triton" else 6  # a second a row in the interpreter
    logits = (normal(rows, 49153, seed=3, scale=3.0) * 8).round() / 8
    for temperature, top_k, top_p in ((1.0, -1, 1.0), (0.8, 50, 1.0), (1.0, -1, 0.95), (0.6, 1000, 0.99), (0.0, -1, 1)):
        got, expected = (draw(logits, temperature, top_k, top_p, face=f) for f in (face, "reference"))
        assert torch.equal(got[0], expected[0])
        assert (got[1] - expected[1]).abs().max() < 1e-5


def test_equal_tokens_stand_in_the_order_of_their_ids(face: str) -> None:
    logits = torch.full((1, 300), -5.0)
    logits[0, [7, 90, 200, 299]] = 2.0
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(logits, 0.0, face=face)[0].tolist() == [7]
    assert draw(logits, top_k=2, uniforms=last, face=face)[0].tolist() == [90]
    assert draw(logits, top_p=0.7, uniforms=last, face=face)[0].tolist() == [200]  # three quarters, by three of them
    assert top_logprobs(logits, torch.ones(1), 5, face=face)[0].tolist() == [[7, 90, 200, 299, 0]]


def test_a_row_is_drawn_alike_whatever_stands_beside_it(face: str) -> None:
    logits = normal(6, 3000, seed=1, scale=3.0)
    arguments = (
        torch.tensor([1.0, 0.7, 0.0, 1.3, 1.0, 0.5]), torch.tensor([-1, 5, -1, -1, 40, 0]),
        torch.tensor([1.0, 1.0, 1.0, 0.8, 0.5, 1.0], dtype=torch.float64), torch.linspace(0, 0.99, 6).double(),
    )  # fmt: skip
    together = sample_rows(logits, *arguments, face=face)
    for i in range(6):
        alone = sample_rows(logits[i : i + 1], *(a[i : i + 1] for a in arguments), face=face)
        assert all(torch.equal(a[0], t[i]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
@pytest.mark.parametrize("temperature", [1.0, 1e-38, 1e30])
def test_a_token_of_probability_zero_is_never_drawn(face: str, uniform: float, temperature: float) -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 123] = 1.0
    for top_p in (1.0, 0.5):
        u = torch.tensor([uniform], dtype=torch.float64)
        tokens, logprobs = draw(logits, temperature, top_p=top_p, uniforms=u, face=face)
        assert (tokens.tolist(), logprobs.tolist()) == ([123], [0.0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution_shows_and_harms_nobody(face: str, bad: float, temperature: float) -> None:
    logits = normal(3, 100, seed=2)
    logits[0, 40], logits[2] = bad, -torch.inf
    tokens, logprobs = draw(logits, temperature, top_k=5, top_p=0.9, face=face)
    assert logprobs.isnan().tolist() == [True, False, True]
    assert tokens[[0, 2]].tolist() == [0, 0]
    assert tokens[1] == draw(logits[1:2], temperature, top_k=5, top_p=0.9, face=face, uniforms=torch.rand(
        3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))[1:2])[0]  # fmt: skip
    assert top_logprobs(logits, torch.ones(3), 2, face=face)[1].isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("k", [1, 5, 256, 257])
def test_the_likeliest_tokens_come_in_order(face: str, k: int) -> None:
    logits = normal(3, 257, seed=8, scale=2.0)
    temperature = torch.tensor([1.0, 0.5, 0.0])
    tokens, logprobs = top_logprobs(strided(logits), temperature, k, face=face)
    exact = torch.log_softmax(logits.double() / torch.tensor([1.0, 0.5, 1.0])[:, None], -1)
    values, order = exact.sort(descending=True, stable=True)
    assert torch.equal(tokens, order[:, :k])
    assert (logprobs - values[:, :k]).abs().max() < 1e-5


def test_arguments_that_do_not_fit_are_named() -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"logits: expected float32 \[R, V\], V >= 1, got torch.float32 \[2, 0\]"):
        draw(logits[:, :0])
    with pytest.raises(ValueError, match=r"uniforms: expected torch.float64 \[2\], got torch.float32 \[2\]"):
        draw(logits, uniforms=torch.zeros(2))
    with pytest.raises(ValueError, match=r"k: expected 1 to 4, got 5 \(top_logprobs\)"):
        top_logprobs(logits, torch.ones(2), 5)
