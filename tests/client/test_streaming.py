"""Tokens as they are drawn, on the user's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from tiny_models import build_tiny

import mint
from mint import types
from mint_engine.engine import Engine
from mint_engine.errors import UserError

PARAMS = types.SamplingParams(max_tokens=12, seed=3, stop=[])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen3", tmp_path_factory.mktemp("base"), tie_word_embeddings=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(dtype="float32", home=tmp_path / "home", kv_cache_bytes=1 << 22)
    yield engine
    engine.close()


@pytest.fixture
def sampler(engine: Engine, model: Path) -> mint.SamplingClient:
    return mint.ServiceClient(engine=engine).create_sampling_client(base_model=str(model))


def test_a_stream_spells_out_what_sample_answers(sampler: mint.SamplingClient) -> None:
    whole = sampler.sample([1, 2, 3], 3, PARAMS).result()

    async def read() -> list[types.SampledToken]:
        return [drawn async for drawn in sampler.stream([1, 2, 3], 3, PARAMS)]

    told = asyncio.run(read())
    for i, sequence in enumerate(whole.sequences):
        assert [d.token for d in told if d.sample == i] == sequence.tokens
        assert [d.logprob for d in told if d.sample == i] == sequence.logprobs


def test_two_streams_and_the_loop_s_other_work_go_on_side_by_side(sampler: mint.SamplingClient) -> None:
    order: list[str] = []
    long = types.SamplingParams(max_tokens=100, stop=[])  # a fast machine draws a dozen before the second has begun

    async def read(name: str) -> None:
        async for drawn in sampler.stream([1, 2, 3], 1, long):
            order.append(name)
            assert drawn.sample == 0

    async def both() -> None:
        await asyncio.gather(read("a"), read("b"))

    asyncio.run(both())
    assert sorted(order) == ["a"] * 100 + ["b"] * 100
    assert order != sorted(order), "neither waited for the other's end"


def test_leaving_a_stream_frees_its_memory(engine: Engine, sampler: mint.SamplingClient) -> None:
    endless = types.SamplingParams(max_tokens=100, stop=[])

    async def read_one() -> None:
        async with aclosing(sampler.stream([1, 2, 3], 4, endless)) as stream:
            async for _ in stream:
                break

    asyncio.run(read_one())
    deadline = time.monotonic() + 10
    while engine.stats().samples_running or engine.stats().kv_cache_bytes_used:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.stats().tokens_sampled < 4 * 100


def test_what_was_refused_is_raised_in_the_loop(sampler: mint.SamplingClient) -> None:
    async def read() -> None:
        async for _ in sampler.stream([1, 2, 3], 1, types.SamplingParams(max_tokens=5, stop=[10**6])):
            pytest.fail("there is nothing to read")

    with pytest.raises(UserError, match="stop: expected token ids"):
        asyncio.run(read())


def test_a_callback_hears_every_token(sampler: mint.SamplingClient) -> None:
    told: list[tuple[int, int, float]] = []
    answer = sampler.sample([1, 2, 3], 1, PARAMS, on_token=lambda *drawn: told.append(drawn)).result()
    assert [token for _, token, _ in told] == answer.sequences[0].tokens
