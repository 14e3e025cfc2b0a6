"""A request has the same bits whatever else there is: company, chunks, what is cached, preemptions, threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import load_decoder, trained_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_helpers import drain, make_sampler, request, step

from mint_engine.adapters import Adapter
from mint_engine.interruption import Interruption
from mint_engine.models.decoder import Decoder
from mint_engine.prompt_scores import PromptQuery
from mint_engine.requests import Request
from mint_engine.types import LoraConfig, SampleResponse

LONG = [(11 * i + 5) % 199 for i in range(150)]

# prompt length, samples, tokens, adapter, temperature, whether the prompt is scored, alternatives to a sampled token
Asked = tuple[int, int, int, int, float, bool, int]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def decoder(tiny_tied: Path, request: pytest.FixtureRequest) -> Decoder:
    return load_decoder(tiny_tied, request.param)


@pytest.fixture(scope="module")
def adapters(decoder: Decoder) -> list[Adapter | None]:
    return [None, *(trained_adapter(decoder, LoraConfig(rank=r, seed=r), scale=0.1) for r in (4, 7))]


def made(asked: Asked, adapters: list[Adapter | None]) -> Request:
    length, samples, tokens, adapter, temperature, scored, topk = asked
    query = PromptQuery(logprobs=True, topk=2) if scored else PromptQuery()
    return request(
        LONG[:length], adapters[adapter], samples, max_tokens=tokens, temperature=temperature, topk=topk, query=query
    )


def bits(response: SampleResponse) -> tuple:
    """All that may not change by a bit."""
    return (
        [(s.tokens, s.logprobs, s.topk_logprobs) for s in response.sequences],
        response.prompt_logprobs,
        response.topk_prompt_logprobs,
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


asked_for = st.tuples(
    st.sampled_from([1, 31, 32, 33, 70, 150]), st.integers(0, 9), st.sampled_from([1, 7, 40]), st.integers(0, 2),
    st.sampled_from([0.0, 0.7, 1.0]), st.booleans(), st.sampled_from([0, 0, 2]),
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=asked_for,
    company=st.lists(st.tuples(asked_for, st.integers(0, 5)), max_size=8),
    place=st.integers(0, 8),
    chunks=st.tuples(st.sampled_from([5, 40, 256]), st.sampled_from([7, 64, 4096])),
    blocks=st.sampled_from([20, 60, 1000]),
    again=st.booleans(),
    at_once=st.booleans(),
    count=st.integers(1, 2),
)
def test_a_request_has_the_same_bits_in_any_company(
    decoder: Decoder, adapters: list, asked: Asked, company: list, place: int, chunks: tuple[int, int], blocks: int,
    again: bool, at_once: bool, count: int,
) -> None:  # fmt: skip
    with threads(1):
        alone = make_sampler(decoder)
        expected = bits(drain(alone, [alone.submit(made(asked, adapters))])[0])
    with threads(count):
        interruption = Interruption() if at_once else None  # several tokens a step
        sampler = make_sampler(
            decoder, blocks, chunk_beside_rows=chunks[0], chunk_alone=chunks[1], interruption=interruption
        )
        if again:  # its prompt, and perhaps others', is in the prefix cache
            drain(sampler, [sampler.submit(made(asked, adapters))])
        mine, futures = None, []
        for i, (other, steps) in enumerate([*company, (asked, 0)]):
            if i == min(place, len(company)):
                mine = sampler.submit(made(asked, adapters))
            futures.append(sampler.submit(made(other, adapters)))
            for _ in range(steps):
                step(sampler)
        assert mine is not None
        drain(sampler, futures)
    assert bits(mine.result(timeout=0)) == expected
