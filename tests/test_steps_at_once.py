"""Several tokens of every sample in one call: the same answers, and nobody waits for them who would not have."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from helpers import load_decoder, trained_adapter
from sampling_helpers import alone, assert_same, drain, make_sampler, request, step

from mint_engine.interruption import Interruption
from mint_engine.kv_cache import BLOCK_TOKENS
from mint_engine.models.decoder import Decoder
from mint_engine.requests import Request
from mint_engine.sampler import STEPS_AT_ONCE, Sampler
from mint_engine.stopping import StopRule
from mint_engine.types import LoraConfig

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


@pytest.fixture(autouse=True)
def all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the time may end a call after any step."""
    monkeypatch.setattr("mint_engine.sampler.SECONDS_AT_ONCE", 60.0)


def hasty(decoder: Decoder, blocks: int = 1000) -> tuple[Sampler, Interruption]:
    interruption = Interruption()
    return make_sampler(decoder, blocks, interruption=interruption), interruption


def tokens_a_step(sampler: Sampler) -> list[int]:
    """How many tokens each step sampled, until there are no more."""
    counts, before = [], sampler.tokens_sampled
    while step(sampler):
        counts.append(sampler.tokens_sampled - before)
        before = sampler.tokens_sampled
    return [count for count in counts if count]


def test_a_sample_alone_is_computed_in_few_steps(decoder: Decoder) -> None:
    sampler, _ = hasty(decoder)
    future = sampler.submit(request(PROMPT, max_tokens=70))
    # The first with the prompt, and one more beside it: others might have come meanwhile.
    assert tokens_a_step(sampler) == [2, STEPS_AT_ONCE, STEPS_AT_ONCE, 70 - 2 - 2 * STEPS_AT_ONCE]
    assert_same(future.result(timeout=0), alone(decoder, request(PROMPT, max_tokens=70)))


def test_samples_of_several_adapters_end_where_they_would_have(decoder: Decoder) -> None:
    """By their lengths and by tokens that end them."""
    adapters = [None, *(trained_adapter(decoder, LoraConfig(rank=r, seed=r), scale=0.1) for r in (4, 7))]
    free = alone(decoder, request(PROMPT, adapters[2], max_tokens=40, seed=3)).sequences[0].tokens
    stop = StopRule(token_ids=frozenset({free[17], 10**6}))

    def cases() -> list[Request]:
        asked = [request(PROMPT[: 3 + i], adapters[i % 3], 2, max_tokens=11 + 9 * i, seed=i) for i in range(5)]
        asked.append(request(PROMPT, adapters[2], max_tokens=40, seed=3))
        asked[-1].stop = stop
        return asked

    sampler, _ = hasty(decoder)
    for got, asked in zip(drain(sampler, [sampler.submit(asked) for asked in cases()]), cases(), strict=True):
        assert_same(got, alone(decoder, asked))
    ended = alone(decoder, cases()[-1]).sequences[0]
    assert (ended.stop_reason, ended.tokens) == ("stop", free[: free.index(free[17]) + 1])


def test_who_wants_to_see_each_token_does(decoder: Decoder) -> None:
    """By on_token, alternatives, a text or any of many tokens that ends it; also beside samples nobody looks at."""

    def with_callback() -> Request:
        asked = request(PROMPT, max_tokens=6)
        asked.on_token = lambda *_: None
        return asked

    def with_text() -> Request:
        asked = request(PROMPT, max_tokens=6)
        asked.stop = StopRule(strings=("x",), decode=lambda _: "")
        return asked

    def with_tokens() -> Request:
        asked = request(PROMPT, max_tokens=6)
        asked.stop = StopRule(token_ids=frozenset(range(10**5, 10**5 + 1000)))
        return asked

    for watched in (with_callback(), with_text(), with_tokens(), request(PROMPT, max_tokens=6, topk=2)):
        sampler, _ = hasty(decoder)
        futures = [sampler.submit(watched), sampler.submit(request(PROMPT[:4], max_tokens=6))]
        assert tokens_a_step(sampler) == [4, 2, 2, 2, 2]
        assert all(len(future.result(timeout=0).sequences[0].tokens) == 6 for future in futures)


def test_whoever_wants_the_device_waits_for_one_step(decoder: Decoder) -> None:
    sampler, interruption = hasty(decoder)
    future = sampler.submit(request(PROMPT, max_tokens=2000))
    step(sampler)
    step(sampler)
    assert sampler.tokens_sampled == 2 + STEPS_AT_ONCE
    interruption.wanted = True
    step(sampler)
    assert sampler.tokens_sampled == 3 + STEPS_AT_ONCE
    interruption.wanted = False
    threading.Timer(0.0, setattr, [interruption, "wanted", True]).start()
    while not interruption.wanted:  # whichever step it comes in
        step(sampler)
    before = sampler.tokens_sampled
    step(sampler)
    assert sampler.tokens_sampled == before + 1
    sampler.cancel(future)
    assert step(sampler)
    assert sampler.cache.blocks_used == 0


def test_time_ends_a_call(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mint_engine.sampler.SECONDS_AT_ONCE", 0.0)
    sampler, _ = hasty(decoder)
    future = sampler.submit(request(PROMPT, max_tokens=5))
    assert tokens_a_step(sampler) == [2, 1, 1, 1]
    assert len(future.result(timeout=0).sequences[0].tokens) == 5


def test_room_for_later_tokens_is_taken_of_nobody(decoder: Decoder) -> None:
    """Two samples fill the cache to the last block: neither gives way, though each could use more blocks at once."""
    sampler, _ = hasty(decoder, blocks=4)
    most = 2 * BLOCK_TOKENS - len(PROMPT)
    futures = [sampler.submit(request(PROMPT, max_tokens=most, seed=i)) for i in range(2)]
    got = drain(sampler, futures)
    assert sampler.preemptions == 0
    for i, answer in enumerate(got):
        assert_same(answer, alone(decoder, request(PROMPT, max_tokens=most, seed=i)))


def test_an_owners_share_is_kept(decoder: Decoder) -> None:
    sampler, _ = hasty(decoder, blocks=16)
    drain(sampler, [sampler.submit(request([9], owner="carol"))])
    futures = [sampler.submit(request(PROMPT, n=8, max_tokens=80, seed=i, owner="mallory")) for i in range(2)]
    while step(sampler):
        assert sampler.cache.blocks_used <= 12
    for i, future in enumerate(futures):
        assert_same(future.result(timeout=0), alone(decoder, request(PROMPT, n=8, max_tokens=80, seed=i)))
