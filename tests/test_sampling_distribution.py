"""100,000 samples from a small vocabulary against the exact tempered, top-k, top-p distribution (chi-squared)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_decoder
from sampling_helpers import chi_squared_p, drain, make_sampler, request

from mint_engine.batch import pack
from mint_engine.models.decoder import Decoder
from mint_engine.requests import MAX_SAMPLES
from mint_engine.sampling import Draw, UniformStream, sample

SAMPLES = 100_000


def exact(logits: torch.Tensor, draw: Draw) -> np.ndarray:
    """The distribution of the tokens in float64: top-k, then top-p over what is left."""
    p = torch.softmax(logits.double() / draw.temperature, -1)
    order = p.argsort(descending=True, stable=True)
    kept = p.clone()
    if draw.top_k >= 1:
        kept[order[draw.top_k :]] = 0
    kept /= kept.sum()
    before = kept[order].cumsum(0) - kept[order]
    kept[order[before >= draw.top_p]] = 0
    return (kept / kept.sum()).numpy()


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Tokens that are expected fewer than ten times count as one."""
    assert counts[p == 0].sum() == 0, "a token that was filtered out"
    expected, rare = p * counts.sum(), p * counts.sum() < 10
    if rare.any():
        counts, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return chi_squared_p(counts, expected, len(counts) - 1)


@pytest.mark.parametrize("draw", [Draw(1.0, -1, 1.0), Draw(0.6, -1, 1.0), Draw(1.3, 7, 1.0), Draw(0.9, 12, 0.8)])
def test_frequencies_are_those_of_the_exact_distribution(draw: Draw) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 1.5
    streams = [UniformStream(seed, index) for seed in range(50) for index in range(20)]
    uniforms = [u for stream in streams for u in stream.peek(SAMPLES // len(streams))]
    tokens, _ = sample(logits.repeat(SAMPLES, 1), [draw] * SAMPLES, uniforms)
    counts = torch.bincount(tokens, minlength=30).numpy()
    assert p_value(counts, exact(logits, draw)) > 0.01
    warmer = Draw(draw.temperature * 1.05, draw.top_k, 1.0)
    assert p_value(counts, np.maximum(exact(logits, warmer), 1e-12)) < 1e-6, "the test tells distributions apart"


def test_so_are_those_of_a_models_samples(tiny_tied: Path) -> None:
    decoder: Decoder = load_decoder(tiny_tied)
    prompt, draw = [3, 17, 5], Draw(4.0, 40, 0.95)
    params = {"temperature": draw.temperature, "top_k": draw.top_k, "top_p": draw.top_p, "max_tokens": 1}
    sampler = make_sampler(decoder)
    calls = -(-SAMPLES // 4 // MAX_SAMPLES)
    futures = [sampler.submit(request(prompt, n=MAX_SAMPLES, seed=seed, **params)) for seed in range(calls)]
    counts = np.zeros(decoder.config.vocab_size)
    for answer in drain(sampler, futures):
        np.add.at(counts, [sequence.tokens[0] for sequence in answer.sequences], 1)
    batch = pack([np.array(prompt)])
    with torch.no_grad():
        seating = decoder.borders.seat([])
        h, _ = decoder.hidden(batch.tokens, batch.positions, seating, decoder.packed_attend(batch))
        logits = decoder.logits(decoder.head_input(h, seating), seating)[-1]
    assert p_value(counts, exact(logits, draw)) > 0.01
