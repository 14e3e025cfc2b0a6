"""Prompts that begin alike share keys and values, within a call and across calls; the results do not show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_decoder, trained_adapter
from sampling_helpers import alone, assert_same, drain, make_sampler, request, step
from scarce_memory import until_there_is_enough

from mint_engine.adapters import Adapter
from mint_engine.errors import NonFiniteError
from mint_engine.kv_cache import BLOCK_TOKENS
from mint_engine.models.decoder import Decoder
from mint_engine.prompt_scores import PromptQuery
from mint_engine.types import LoraConfig

PREFIX = [(7 * i + 3) % 199 for i in range(3 * BLOCK_TOKENS)]
# The prefix alone, the prefix and less or more than a block, half of it, something else.
PROMPTS = [PREFIX, [*PREFIX, 5], [*PREFIX, *range(50)], [*PREFIX[: BLOCK_TOKENS + 9], 1, 2], list(range(100, 170))]
HITS = [2, 3, 3, 1, 0]  # whole blocks of PREFIX that a later call finds; the last token is always computed


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


@pytest.fixture(scope="module")
def adapters(decoder: Decoder) -> list[Adapter | None]:
    return [None, *(trained_adapter(decoder, LoraConfig(rank=r, seed=r), scale=0.1) for r in (4, 7))]


def test_calls_that_share_a_prefix_answer_as_if_they_did_not(decoder: Decoder, adapters: list) -> None:
    """One after the other, and all at once: in one pass, where the first computes what the others read."""
    cases = [(p, a) for a in adapters for p in PROMPTS]
    expected = [alone(decoder, request(p, a, n=3)) for p, a in cases]
    sampler = make_sampler(decoder)
    for (p, a), e in zip(cases, expected, strict=True):
        assert_same(drain(sampler, [sampler.submit(request(p, a, n=3))])[0], e)
    computed = sampler.tokens_prefilled
    together = make_sampler(decoder)
    futures = [together.submit(request(p, a, n=3)) for p, a in cases]
    for got, e in zip(drain(together, futures), expected, strict=True):
        assert_same(got, e)
    assert together.tokens_prefilled == computed == 3 * (sum(map(len, PROMPTS)) - BLOCK_TOKENS * sum(HITS[1:]))


def test_the_response_tells_how_much_of_the_prompt_was_cached(decoder: Decoder) -> None:
    sampler = make_sampler(decoder)
    first = drain(sampler, [sampler.submit(request(PREFIX, n=2))])[0]
    assert first.prompt_cache_hit_tokens == 0
    for prompt, blocks in zip(PROMPTS, HITS, strict=True):
        before = sampler.tokens_prefilled
        got = drain(sampler, [sampler.submit(request(prompt))])[0]
        assert got.prompt_cache_hit_tokens == blocks * BLOCK_TOKENS
        assert sampler.tokens_prefilled - before == len(prompt) - blocks * BLOCK_TOKENS


def test_the_samples_of_a_call_hold_their_prompt_once(decoder: Decoder) -> None:
    sampler = make_sampler(decoder)
    future = sampler.submit(request([*PREFIX, 1, 2], n=8, max_tokens=4))
    step(sampler)
    assert sampler.cache.blocks_used == 3 + 8, "three whole blocks, and a copy of the partial one each"
    one_token = sampler.submit(request([*PREFIX, 1, 3], n=8, max_tokens=1))
    before = sampler.cache.blocks_used
    step(sampler)
    assert one_token.done()
    assert sampler.cache.blocks_used == before, "they ended before they wrote, so nothing was copied for them"
    drain(sampler, [future])


def test_what_was_sampled_is_not_passed_off_as_prompt(decoder: Decoder) -> None:
    """A decode step and a prompt pass may round differently, so a later prompt is computed as a prompt."""
    sampler = make_sampler(decoder)
    sampled = drain(sampler, [sampler.submit(request(PREFIX, max_tokens=2 * BLOCK_TOKENS))])[0].sequences[0].tokens
    longer = request([*PREFIX, *sampled])
    got = drain(sampler, [sampler.submit(longer)])[0]
    assert got.prompt_cache_hit_tokens == len(PREFIX)
    assert_same(got, alone(decoder, request([*PREFIX, *sampled])))


def test_versions_of_an_adapter_never_share(decoder: Decoder) -> None:
    adapter = trained_adapter(decoder, LoraConfig(rank=4, seed=1), scale=0.1)
    sampler = make_sampler(decoder)
    first, second = adapter.snapshot(), adapter.snapshot()
    second.params.mul_(1.5)
    for version in (None, first, second, None, first, second):
        drain(sampler, [sampler.submit(request(PREFIX, version, n=2))])
    hits = []
    first.params.mul_(0.5)  # no sampler's weights change; if ever they did, the version says so
    first.version += 1
    for version in (first, second, None):
        got = drain(sampler, [sampler.submit(request([*PREFIX, 1], version, n=2))])[0]
        hits.append(got.prompt_cache_hit_tokens)
        assert_same(got, alone(decoder, request([*PREFIX, 1], version, n=2)))
    assert hits == [0, len(PREFIX), len(PREFIX)]


def test_owners_never_share(decoder: Decoder) -> None:
    sampler = make_sampler(decoder)
    for owner, hit in (("a", 0), ("b", 0), ("a", 2 * BLOCK_TOKENS), ("", 0)):
        got = drain(sampler, [sampler.submit(request(PREFIX, owner=owner))])[0]
        assert got.prompt_cache_hit_tokens == hit


def test_rows_that_are_scored_are_computed_whatever_is_cached(decoder: Decoder, adapters: list) -> None:
    sampler = make_sampler(decoder)
    for last_n, hit in ((None, 0), (3, 2 * BLOCK_TOKENS), (BLOCK_TOKENS, BLOCK_TOKENS), (500, 0)):
        for n in (0, 2):
            targets = np.arange(len(PREFIX) - 1)[:, None]
            query = PromptQuery(logprobs=True, topk=2, targets=targets, alternatives=1, last_n=last_n)
            got = drain(sampler, [sampler.submit(request(PREFIX, adapters[1], n, query=query))])[0]
            expected = alone(decoder, request(PREFIX, adapters[1], n, query=query))
            assert_same(got, expected)
            assert (got.prompt_cache_hit_tokens, expected.prompt_cache_hit_tokens) in ((hit, 0), (0, 0))
            assert got.target_prompt_logprobs is not None
            assert expected.target_prompt_logprobs is not None
            scores = got.target_prompt_logprobs.to_numpy(), expected.target_prompt_logprobs.to_numpy()
            np.testing.assert_allclose(*scores, atol=1e-5)
            assert got.prompt_alt_tokens is not None
            assert expected.prompt_alt_tokens is not None
            drawn = got.prompt_alt_tokens.tokens.to_numpy(), expected.prompt_alt_tokens.tokens.to_numpy()
            assert (drawn[0] == drawn[1]).all()
            ids = [[[t for t, _ in top or []] for top in r.topk_prompt_logprobs or []] for r in (got, expected)]
            assert ids[0] == ids[1]


def test_a_prompt_longer_than_the_cache_is_scored_all_the_same(decoder: Decoder, adapters: list) -> None:
    sampler = make_sampler(decoder, blocks=2)
    query = PromptQuery(logprobs=True)
    futures = [sampler.submit(request(PREFIX, a, 0, query=query)) for a in adapters]
    for a, got in zip(adapters, drain(sampler, futures), strict=True):
        assert_same(got, alone(decoder, request(PREFIX, a, 0, query=query)))


def test_a_pass_that_fails_leaves_nothing_to_be_found(tiny_tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(tiny_tied)
    sampler = make_sampler(decoder)
    expected = alone(decoder, request(PREFIX))

    def out_of_memory(*_: object) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr("mint_engine.models.fused.decoder_layers", out_of_memory)
        future = sampler.submit(request(PREFIX))
        step(sampler)
        assert isinstance(future.exception(timeout=0), MemoryError)
    assert sampler.cache.blocks_available == sampler.cache.num_blocks
    got = drain(sampler, [sampler.submit(request(PREFIX))])[0]
    assert got.prompt_cache_hit_tokens == 0
    assert_same(got, expected)


def test_memory_that_ends_in_the_middle_fails_its_requests_and_no_later_one(tiny_tied: Path) -> None:
    """In a kernel, in a prompt's pass or a decode step: what is left in the cache is found by nobody."""
    decoder = load_decoder(tiny_tied, torch.bfloat16)
    adapter, sampler = trained_adapter(decoder, LoraConfig(rank=4, seed=4), scale=0.1), make_sampler(decoder)
    calls = [(PREFIX, adapter), (PREFIX, None), (PROMPTS[3], adapter)]
    expected = [alone(decoder, request(p, a, max_tokens=6)) for p, a in calls]

    def attempt() -> None:
        futures = [sampler.submit(request(p, a, max_tokens=6)) for p, a in calls]
        while not all(future.done() for future in futures):
            step(sampler)
        errors = [error for future in futures if (error := future.exception()) is not None]
        for future, right in zip(futures, expected, strict=True):
            if future.exception() is None:
                assert_same(future.result(), right)
        for error in errors:
            raise error

    failed = until_there_is_enough(attempt)[1]
    assert failed > 12
    assert sampler.cache.blocks_available == sampler.cache.num_blocks


def test_a_model_that_breaks_does_not_leave_its_numbers_behind(tiny_tied: Path) -> None:
    """The logits are not finite because of the last norm: what is in the cache is sound, and stays."""
    decoder = load_decoder(tiny_tied)
    sampler = make_sampler(decoder)
    norm, decoder.norm = decoder.norm, decoder.norm * float("nan")
    future = sampler.submit(request(PREFIX))
    step(sampler)
    assert isinstance(future.exception(timeout=0), NonFiniteError)
    decoder.norm = norm
    assert_same(drain(sampler, [sampler.submit(request(PREFIX))])[0], alone(decoder, request(PREFIX)))


def test_a_layer_that_breaks_leaves_nothing_behind(tiny_tied: Path) -> None:
    decoder = load_decoder(tiny_tied)
    sampler = make_sampler(decoder)
    layer = decoder.layers[1]
    norm, layer.attention_norm = layer.attention_norm, layer.attention_norm * float("nan")
    future = sampler.submit(request(PREFIX))
    step(sampler)
    assert isinstance(future.exception(timeout=0), NonFiniteError)
    layer.attention_norm = norm
    assert_same(drain(sampler, [sampler.submit(request(PREFIX))])[0], alone(decoder, request(PREFIX)))
    assert torch.isfinite(decoder.norm).all()
