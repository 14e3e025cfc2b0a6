"""Speculation proposes; it changes neither what is sampled nor how often, only the number of steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_decoder, trained_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_helpers import assert_drawn, chi_squared_p, drain, make_sampler, request, step

from mint_engine.adapters import Adapter
from mint_engine.models.decoder import Decoder
from mint_engine.sampler import Sampler
from mint_engine.sampling import UniformStream, sample
from mint_engine.speculation import MATCH, MOST_ROWS, PromptLookup
from mint_engine.types import LoraConfig


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


@pytest.fixture(scope="module")
def adapters(decoder: Decoder) -> list[Adapter | None]:
    return [None, *(trained_adapter(decoder, LoraConfig(rank=r, seed=r), scale=0.1) for r in (4, 7))]


def test_what_followed_the_last_time_is_proposed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 1, 2])
    assert lookup.propose(4) == [], "[6, 1, 2] never came before"
    lookup.extend([3])
    assert lookup.propose(4) == [4, 5, 6]
    assert lookup.propose(1) == [4]
    lookup.extend([9, 1, 2, 3])
    assert lookup.propose(1) == [9], "the last time counts"


def test_a_repetition_goes_on() -> None:
    lookup = PromptLookup([7, 8, 7, 8, 7])
    assert lookup.propose(3) == [8, 7, 8]
    assert PromptLookup([5, 5, 5, 5]).propose(3) == [5, 5, 5]


def test_proposals_grow_while_they_are_right() -> None:
    lookup = PromptLookup([5] * 50)
    assert len(lookup.propose(99)) == MATCH
    lookup.learn(MATCH, MATCH)
    assert len(lookup.propose(99)) == 2 * MATCH
    lookup.learn(2 * MATCH, 1)
    assert len(lookup.propose(99)) == 2
    lookup.learn(2, 0)
    assert len(lookup.propose(99)) == 1


def test_looking_ahead_takes_nothing_from_a_stream() -> None:
    looked, plain = UniformStream(3, 1), UniformStream(3, 1)
    ahead = looked.peek(5)
    assert ahead == [plain.take(1)[0] for _ in range(5)]
    assert looked.take(2) == ahead[:2]
    assert looked.peek(3) == ahead[2:]


def steps_of(sampler: Sampler) -> int:
    count = 0
    while step(sampler):
        count += 1
        assert sampler.cache.blocks_used <= sampler.cache.num_blocks
    return count


def test_repeated_text_takes_fewer_steps(decoder: Decoder) -> None:
    """Greedy samples of a small random model soon repeat themselves."""
    plain, fast = make_sampler(decoder), make_sampler(decoder, speculation=MOST_ROWS)
    asked = [s.submit(request([3, 17, 5], max_tokens=200, temperature=0.0)) for s in (plain, fast)]
    many, few = steps_of(plain), steps_of(fast)
    a, b = (future.result(timeout=0).sequences[0] for future in asked)
    assert a.tokens == b.tokens
    np.testing.assert_allclose(a.logprobs or [], b.logprobs or [], rtol=1e-5, atol=1e-5)
    assert many == 199, "the first step computes the prompt and two tokens"
    assert few < many / 2


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases=st.lists(
        st.tuples(
            st.integers(1, 60), st.integers(1, 3), st.sampled_from([1, 5, 70]), st.integers(0, 2), st.integers(0, 9)
        ),
        min_size=1, max_size=5,
    ),
    blocks=st.sampled_from([8, 12, 1000]),
    speculation=st.sampled_from([1, 3, 20]),
)  # fmt: skip
def test_every_token_is_what_its_own_distribution_and_random_number_give(
    decoder: Decoder, adapters: list, cases: list, blocks: int, speculation: int
) -> None:
    """Also with little memory, where what is proposed takes no blocks and samples give way."""
    sampler = make_sampler(decoder, blocks, speculation=speculation)
    asked = [
        request([i % 5 for i in range(length)], adapters[a], n, max_tokens=tokens, seed=seed)
        for length, n, tokens, a, seed in cases
    ]
    futures = [sampler.submit(one) for one in asked]
    for one, got in zip(asked, drain(sampler, futures), strict=True):
        assert_drawn(decoder, one, got)


def likely_few(logits: torch.Tensor, draws, uniforms) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampling where three tokens are far likelier than the others: proposals are often right and often wrong."""
    logits = logits * 0.1
    logits[:, :3] += torch.tensor([9.5, 8.5, 8.0])
    return sample(logits, draws, uniforms)


def test_speculative_samples_are_distributed_as_plain_ones(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of four tokens, mostly of three likely ones: chi-squared of two lots of sequences, fixed seeds."""
    monkeypatch.setattr("mint_engine.sampler.sample", likely_few)
    monkeypatch.setattr("mint_engine.sampler.steps_in_a_call", lambda *_: False)  # that draws in C++
    counts, steps = [], []
    for speculation in (0, 4):
        sampler = make_sampler(decoder, speculation=speculation)
        seen = np.zeros((4, 4, 4, 4))
        steps.append(0)
        for group in range(400):
            seeds = [8 * group + i + speculation for i in range(4)]  # all different
            futures = [sampler.submit(request([0] * 8, max_tokens=4, seed=seed)) for seed in seeds]
            steps[-1] += steps_of(sampler)
            for future in futures:
                seen[tuple(min(token, 3) for token in future.result(timeout=0).sequences[0].tokens)] += 1
        counts.append(seen.reshape(-1))
    both = np.stack(counts)
    both = both[:, both.sum(0) >= 10]
    assert both.shape[1] > 40
    expected = both.sum(1, keepdims=True) * both.sum(0) / both.sum()
    assert chi_squared_p(both, expected, both.shape[1] - 1) > 0.01
    assert steps[1] < steps[0], "some proposals were right, of all four samples in a step"
