"""Requests and small samplers for the tests of scheduling, and what their answers are held to."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from mint_engine.adapters import Adapter
from mint_engine.batch import pack
from mint_engine.kv_cache import BLOCK_TOKENS
from mint_engine.models.decoder import Decoder
from mint_engine.prompt_scores import PromptQuery
from mint_engine.requests import Request
from mint_engine.sampler import Sampler
from mint_engine.sampling import UniformStream
from mint_engine.stopping import StopRule
from mint_engine.types import SampleResponse, SamplingParams


def make_sampler(decoder: Decoder, blocks: int = 1000, **settings: Any) -> Sampler:
    c = decoder.config
    block_bytes = 2 * c.num_layers * BLOCK_TOKENS * c.num_kv_heads * c.head_dim * decoder.dtype.itemsize
    sampler = Sampler(decoder, blocks * block_bytes, lambda: None, **settings)
    sampler.cache.k.fill_(torch.nan)  # what nobody wrote must reach nobody
    sampler.cache.v.fill_(torch.nan)
    return sampler


def request(
    prompt: list[int], adapter: Adapter | None = None, n: int = 1, *, owner: str = "", topk: int = 0,
    query: PromptQuery | None = None, **params,
) -> Request:  # fmt: skip
    ids = [str(i) for i in range(n)]
    params = {"max_tokens": 10, "seed": 5, **params}
    return Request(
        adapter, np.array(prompt), n, SamplingParams(**params), StopRule(), query or PromptQuery(), topk, ids,
        owner=owner,
    )  # fmt: skip


def step(sampler: Sampler) -> bool:
    with torch.no_grad():
        return sampler.step()


def drain(sampler: Sampler, futures: list[Future]) -> list[SampleResponse]:
    while step(sampler):
        assert sampler.cache.blocks_used <= sampler.cache.num_blocks
    assert sampler.cache.blocks_available == sampler.cache.num_blocks, "everything was given back"
    return [f.result(timeout=0) for f in futures]


def alone(decoder: Decoder, asked: Request) -> SampleResponse:
    """What the request gets from a sampler that nobody has used."""
    sampler = make_sampler(decoder)
    return drain(sampler, [sampler.submit(asked)])[0]


def assert_same(got: SampleResponse, expected: SampleResponse) -> None:
    """Equal tokens and stops, log-probabilities to 1e-5 (of themselves where beyond 1: so large are the logits)."""
    assert [s.tokens for s in got.sequences] == [s.tokens for s in expected.sequences]
    for a, b in zip(got.sequences, expected.sequences, strict=True):
        assert a.stop_reason == b.stop_reason
        np.testing.assert_allclose(a.logprobs or [], b.logprobs or [], rtol=1e-5, atol=1e-5)
        assert (a.topk_logprobs is None) == (b.topk_logprobs is None)
        for x, y in zip(a.topk_logprobs or [], b.topk_logprobs or [], strict=True):
            np.testing.assert_allclose([lp for _, lp in x or []], [lp for _, lp in y or []], rtol=1e-5, atol=1e-5)
    if expected.prompt_logprobs is not None:
        np.testing.assert_allclose(got.prompt_logprobs_np, expected.prompt_logprobs_np, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@torch.no_grad()
def assert_drawn(decoder: Decoder, asked: Request, got: SampleResponse) -> None:
    """Every token is what the training forward's distribution and the sample's stream of uniforms give.

    For random requests, at temperature 1: another sampler's answer may differ where a uniform falls on a boundary.
    """
    assert len(got.sequences) == asked.num_samples
    for index, sequence in enumerate(got.sequences):
        assert len(sequence.tokens) == asked.params.max_tokens
        batch = pack([np.concatenate([asked.prompt, np.array(sequence.tokens[:-1], dtype=np.int64)])])
        seating = decoder.borders.seat([(asked.adapter, 0, batch.num_tokens)])
        h, _ = decoder.hidden(batch.tokens, batch.positions, seating, decoder.packed_attend(batch))
        rows = torch.arange(len(asked.prompt) - 1, batch.num_tokens)
        own = seating.select(rows)
        logprobs = torch.log_softmax(decoder.logits(decoder.head_input(h[rows], own), own), -1)
        tokens = torch.tensor(sequence.tokens)[:, None]
        np.testing.assert_allclose(sequence.logprobs or [], logprobs.gather(1, tokens)[:, 0], rtol=1e-5, atol=1e-5)
        stream = UniformStream(asked.params.seed, index)
        uniforms = torch.tensor(stream.take(len(sequence.tokens)))
        p = logprobs.double().exp()
        end = p.cumsum(1).gather(1, tokens)[:, 0]
        begin = end - p.gather(1, tokens)[:, 0]
        assert ((begin - 1e-4 <= uniforms) & (uniforms <= end + 1e-4)).all()


def chi_squared_p(observed: np.ndarray, expected: np.ndarray, freedom: int) -> float:
    """How likely counts are at least so far from the ``expected`` ones, with so many degrees of freedom."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
