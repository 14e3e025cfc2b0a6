"""Temperature, top-k, top-p and seeds, against the distributions they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine.sampling import Draw, UniformStream, choose, tempered_logprobs

GRID = 800  # evenly spaced uniforms: frequencies are exact to 1/GRID, no statistics needed


def frequencies(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """How often each token is chosen over an even grid of uniforms."""
    rows = logits.expand(GRID, -1)
    draws = [draw] * GRID
    tokens = choose(tempered_logprobs(rows, draws), draws, [(i + 0.5) / GRID for i in range(GRID)])
    return torch.bincount(tokens, minlength=logits.numel()) / GRID


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([2, 7, 255, 256, 257, 600]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 1, 3, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
)
def test_tokens_follow_the_filtered_distribution(seed, vocab, temperature, top_k, top_p) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 2
    p = torch.softmax(logits.double() / temperature, -1)
    order = p.argsort(descending=True)
    kept = torch.ones(vocab, dtype=torch.bool)
    if top_k >= 1:
        kept[order[top_k:]] = False
    q = (p * kept) / (p * kept).sum()
    if top_p < 1:
        before = q[order].cumsum(0) - q[order]
        kept[order[before >= top_p]] = False
    q = (p * kept) / (p * kept).sum()
    got = frequencies(logits, Draw(temperature, top_k, top_p))
    assert (got[~kept] == 0).all()
    assert (got - q).abs().max() <= 1.01 / GRID


def test_greedy_takes_the_largest_and_reports_temperature_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    draws = [Draw(0.0, -1, 1.0)]
    logprobs = tempered_logprobs(logits, draws)
    assert choose(logprobs, draws, [0.999]).tolist() == [1]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1))


def test_reported_logprobs_are_tempered_and_not_renormalised_by_the_filters() -> None:
    logits = torch.randn(2, 50)
    draws = [Draw(0.5, 3, 0.9), Draw(2.0, -1, 1.0)]
    expected = torch.stack([torch.log_softmax(logits[0] / 0.5, -1), torch.log_softmax(logits[1] / 2.0, -1)])
    torch.testing.assert_close(tempered_logprobs(logits, draws), expected)


def test_a_row_is_drawn_alike_whatever_stands_beside_it() -> None:
    logits = torch.randn(5, 300)
    draws = [Draw(1.0, -1, 1.0), Draw(0.7, 5, 1.0), Draw(0.0, -1, 1.0), Draw(1.3, -1, 0.8), Draw(1.0, -1, 1.0)]
    uniforms = [0.1, 0.5, 0.2, 0.93, 0.77]
    together = choose(tempered_logprobs(logits, draws), draws, uniforms)
    for i, draw in enumerate(draws):
        alone = choose(tempered_logprobs(logits[i : i + 1], [draw]), [draw], [uniforms[i]])
        assert alone[0] == together[i]


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_a_token_of_probability_zero_is_never_chosen(uniform: float) -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 123] = 1.0
    draws = [Draw(1.0, -1, 1.0)]
    assert choose(tempered_logprobs(logits, draws), draws, [uniform]).tolist() == [123]


def test_a_seed_fixes_a_stream_and_samples_have_streams_of_their_own() -> None:
    def take(seed: int | None, index: int) -> list[float]:
        stream = UniformStream(seed, index)
        return [stream.next() for _ in range(4)]

    assert take(3, 0) == take(3, 0)
    assert take(3, 0) != take(3, 1)
    assert take(3, 0) != take(4, 0)
    assert take(-1, 0) == take(-1, 0)
    assert take(None, 0) != take(None, 0)
