"""Little memory and long prompts: samples give way, prompts come in chunks, and every answer is that of a sampler with
all the memory and nobody else in it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import load_decoder, trained_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_helpers import alone, assert_drawn, assert_same, drain, make_sampler, request, step

from mint_engine.adapters import Adapter
from mint_engine.errors import SampleCancelledError, UserError
from mint_engine.interruption import Interruption
from mint_engine.kv_cache import BLOCK_TOKENS
from mint_engine.models.decoder import Decoder
from mint_engine.prompt_scores import PromptQuery
from mint_engine.requests import Request
from mint_engine.sampler import Sampler
from mint_engine.types import LoraConfig

LONG = [(11 * i + 5) % 199 for i in range(200)]


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


@pytest.fixture(scope="module")
def adapters(decoder: Decoder) -> list[Adapter | None]:
    return [None, *(trained_adapter(decoder, LoraConfig(rank=r, seed=r), scale=0.1) for r in (4, 7))]


def test_preempted_samples_end_as_if_nothing_had_happened(decoder: Decoder, adapters: list) -> None:
    """Three adapters, samples that outgrow the cache; what is told of a sample is told once and in order."""
    cases = [(LONG[: 10 + 20 * i], adapters[i % 3]) for i in range(5)]
    expected = [alone(decoder, request(p, a, 3, max_tokens=50, topk=2, seed=i)) for i, (p, a) in enumerate(cases)]
    sampler = make_sampler(decoder, blocks=9)
    told: list[list[tuple[int, int, float]]] = []
    futures = []
    for i, (p, a) in enumerate(cases):
        asked = request(p, a, 3, max_tokens=50, topk=2, seed=i)
        told.append([])
        asked.on_token = lambda *token, log=told[-1]: log.append(token)  # type: ignore[misc]
        futures.append(sampler.submit(asked))
    for got, wanted, log in zip(drain(sampler, futures), expected, told, strict=True):
        assert_same(got, wanted)
        for i, sequence in enumerate(got.sequences):
            assert [token for index, token, _ in log if index == i] == sequence.tokens
            assert [lp for index, _, lp in log if index == i] == sequence.logprobs
    assert sampler.preemptions > 0


def test_samples_that_together_do_not_fit_are_taken_in_turn(decoder: Decoder) -> None:
    """One call of eight samples, each of which needs more than half of the cache."""
    sampler = make_sampler(decoder, blocks=4)
    got = drain(sampler, [sampler.submit(request(LONG[:40], n=8, max_tokens=60))])[0]
    assert_same(got, alone(decoder, request(LONG[:40], n=8, max_tokens=60)))
    assert sampler.preemptions > 0
    with pytest.raises(UserError, match="do not fit the KV cache of 128 tokens"):
        sampler.submit(request(LONG[:40], max_tokens=89))


def test_a_sample_takes_blocks_as_it_grows(decoder: Decoder) -> None:
    """Without max_tokens it holds what it has, and leaves the rest to others."""
    sampler = make_sampler(decoder, blocks=40)
    greedy = sampler.submit(request([1, 2, 3], max_tokens=None, temperature=0.0))
    step(sampler)
    assert sampler.cache.blocks_used == 1
    others = [sampler.submit(request([4, 5, i], max_tokens=20)) for i in range(20)]
    step(sampler)
    assert (sampler.load(), sampler.running) == ((0, 0), 21)
    drain(sampler, [greedy, *others])
    assert sampler.preemptions == 0


def test_a_long_prompt_does_not_hold_up_the_others(decoder: Decoder) -> None:
    sampler = make_sampler(decoder, chunk_beside_rows=16)
    running = request([1, 2, 3], max_tokens=60)
    told: list[int] = []
    running.on_token = lambda index, token, logprob: told.append(token)
    first = sampler.submit(running)
    step(sampler)
    second = sampler.submit(request(LONG, n=2))
    for i in range(-(-len(LONG) // 16)):
        assert len(told) == 2 + i, "a token each step"
        assert sampler.tokens_prefilled == 3 + 16 * i
        step(sampler)
    assert sampler.tokens_prefilled == 3 + len(LONG)
    for got, asked in zip(
        drain(sampler, [first, second]), (request([1, 2, 3], max_tokens=60), request(LONG, n=2)), strict=True
    ):
        assert_same(got, alone(decoder, asked))


@pytest.mark.parametrize("chunk", [9, 32, 64])
def test_a_prompt_in_chunks_is_the_same_prompt(decoder: Decoder, adapters: list, chunk: int) -> None:
    sampler = make_sampler(decoder, chunk_beside_rows=chunk, chunk_alone=chunk)
    query = PromptQuery(logprobs=True, last_n=70)
    cases = [(a, n, q) for a in adapters for n, q in ((2, PromptQuery()), (1, query), (0, query))]
    futures = [sampler.submit(request(LONG[:100], a, n, query=q)) for a, n, q in cases]
    for got, (a, n, q) in zip(drain(sampler, futures), cases, strict=True):
        assert_same(got, alone(decoder, request(LONG[:100], a, n, query=q)))


def test_cancelling_frees_a_prompt_in_work_and_what_was_preempted(decoder: Decoder) -> None:
    sampler = make_sampler(decoder, blocks=10, chunk_alone=8)
    half_way = sampler.submit(request(LONG[:100]))
    step(sampler)
    assert sampler.cache.blocks_used > 0
    assert sampler.cancel(half_way)
    assert step(sampler)
    assert sampler.cache.blocks_used == 0
    futures = [sampler.submit(request(LONG[:60], n=4, max_tokens=90, seed=i)) for i in range(2)]
    while not sampler.preemptions:
        step(sampler)
    assert sampler.load() == (1, 60), "what was preempted is running; the second call has not begun"
    assert sampler.running == 1
    assert sampler.cancel(futures[0])
    assert isinstance(futures[0].exception(timeout=0), SampleCancelledError)
    (got,) = drain(sampler, futures[1:])
    assert_same(got, alone(decoder, request(LONG[:60], n=4, max_tokens=90, seed=1)))


def test_a_sample_that_is_cancelled_before_its_first_token_takes_nobody_with_it(decoder: Decoder) -> None:
    """Cancelled while its prompt is computed beside others', which are decoded in the same step."""
    sampler = make_sampler(decoder)
    first, second, third = (request([1, 2, 3 + i], n=2, max_tokens=6) for i in range(3))
    expected = [alone(decoder, replace(asked, future=Future())) for asked in (first, third)]
    first.on_token = lambda index, token, logprob: sampler.cancel(second.future)
    futures = [sampler.submit(asked) for asked in (first, second, third)]
    while step(sampler):
        pass
    assert isinstance(futures[1].exception(timeout=0), SampleCancelledError)
    for got, wanted in zip((futures[0], futures[2]), expected, strict=True):
        assert_same(got.result(timeout=0), wanted)
    assert sampler.cache.blocks_available == sampler.cache.num_blocks


def test_a_call_that_fails_takes_its_preempted_samples_along(decoder: Decoder) -> None:
    sampler = make_sampler(decoder, blocks=6)
    asked = request(LONG[:40], n=6, max_tokens=60)

    def break_later(index: int, token: int, logprob: float) -> None:
        if sampler.preemptions:
            raise BrokenPipeError("the reader has gone")

    asked.on_token = break_later
    futures = [sampler.submit(asked), sampler.submit(request(LONG[:40], max_tokens=60, seed=9))]
    while not futures[0].done():
        step(sampler)
    assert isinstance(futures[0].exception(timeout=0), BrokenPipeError)
    assert_same(drain(sampler, futures[1:])[0], alone(decoder, request(LONG[:40], max_tokens=60, seed=9)))


def test_an_owner_does_not_grow_over_the_others(decoder: Decoder) -> None:
    """Mallory's samples grow to fill the cache; Carol's call finds a quarter of it."""
    sampler = make_sampler(decoder, blocks=16)
    drain(sampler, [sampler.submit(request([9], owner="carol"))])
    hers = [sampler.submit(request(LONG[:20], n=8, max_tokens=80, seed=i, owner="mallory")) for i in range(2)]
    for _ in range(60):
        step(sampler)
        held = {b for row in sampler._rows if row.request.owner == "mallory" for b in row.cache.blocks}
        assert len(held) <= 12
    assert sampler.preemptions > 0
    carols = sampler.submit(request(LONG[:40], n=2, max_tokens=5, owner="carol"))
    for _ in range(6):
        step(sampler)
    assert carols.done()
    assert not any(f.done() for f in hers)
    for i, got in enumerate(drain(sampler, hers)):
        assert_same(got, alone(decoder, request(LONG[:20], n=8, max_tokens=80, seed=i)))


Arrival = tuple[int, int, int, int, int, str]  # prompt kind, prompt length, samples, tokens, adapter, owner


def asked_for(arrival: Arrival, adapters: list[Adapter | None]) -> Request:
    kind, length, samples, tokens, adapter, owner = arrival
    prompt = [LONG[i] if i < 40 else (LONG[i] + kind) % 199 for i in range(length)]
    return request(prompt, adapters[adapter], samples, max_tokens=tokens, seed=kind, owner=owner)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(
        st.tuples(
            st.tuples(
                st.integers(0, 1), st.sampled_from([3, 32, 45, 80]), st.integers(0, 4), st.sampled_from([1, 9, 45]),
                st.integers(0, 2), st.sampled_from(["a", "b"]),
            ),
            st.integers(0, 12),  # steps until the next
            st.sampled_from([None, None, 0, 7]),  # the one so many before is cancelled
        ),
        min_size=2, max_size=14,
    ),
    blocks=st.integers(5, 14),
    chunk=st.sampled_from([5, 40, 4096]),
    at_once=st.booleans(),
)  # fmt: skip
def test_whatever_comes_and_goes_everybody_else_is_answered(
    decoder: Decoder, adapters: list, arrivals: list, blocks: int, chunk: int, at_once: bool
) -> None:
    interruption = Interruption() if at_once else None  # several tokens a step
    sampler: Sampler = make_sampler(
        decoder, blocks=blocks, chunk_beside_rows=chunk, chunk_alone=chunk, interruption=interruption
    )
    futures: list[Future] = []
    for arrival, steps, cancel in arrivals:
        futures.append(sampler.submit(asked_for(arrival, adapters)))
        for _ in range(steps):
            step(sampler)
        if cancel is not None and cancel < len(futures):
            sampler.cancel(futures[-1 - cancel])
    limit = 4000
    while step(sampler):
        assert (limit := limit - 1), "nobody waits for ever"
    assert sampler.cache.blocks_used == 0
    assert sampler.load() == (0, 0)
    for (arrival, _, _), future in zip(arrivals, futures, strict=True):
        if isinstance(future.exception(timeout=0), SampleCancelledError):
            continue
        assert_drawn(decoder, asked_for(arrival, adapters), future.result(timeout=0))


def test_blocks_of_a_cancelled_prompt_that_were_computed_serve_the_next(decoder: Decoder) -> None:
    sampler = make_sampler(decoder, chunk_alone=BLOCK_TOKENS + 1)
    future = sampler.submit(request(LONG))
    step(sampler)
    sampler.cancel(future)
    got = drain(sampler, [sampler.submit(request(LONG))])[0]
    assert got.prompt_cache_hit_tokens == BLOCK_TOKENS
    assert_same(got, alone(decoder, request(LONG)))


def test_adapters_that_do_not_fit_the_borders_together_wait(decoder: Decoder) -> None:
    """Room in the borders is a square of the ranks that sit there, and stays."""
    ranks = [4, 7, 5, 3]
    adapters = [trained_adapter(decoder, LoraConfig(rank=r, seed=r), scale=0.1) for r in ranks]
    cases = [(LONG[: 5 + i], adapters[i % 4]) for i in range(9)]
    expected = [alone(decoder, request(p, a, 2, seed=i)) for i, (p, a) in enumerate(cases)]
    sampler = make_sampler(decoder, max_ranks=11)
    futures = [sampler.submit(request(p, a, 2, seed=i)) for i, (p, a) in enumerate(cases)]
    most = 0
    while step(sampler):
        most = max(most, sum(a.rank for a in {row.request.adapter for row in sampler._schedule.rows}))
    assert 8 <= most <= 11, "some are computed for together, but never too many"
    for future, wanted in zip(futures, expected, strict=True):
        assert_same(future.result(timeout=0), wanted)
