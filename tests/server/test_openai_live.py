"""The OpenAI face of a real server with a real (tiny) model, through the `openai` package."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai_fakes import byte_tokenizer
from server_fixture import LiveServer, live_server
from tiny_models import build_tiny

from mint_engine.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

CHAT: Any = [{"role": "user", "content": "héllo"}]
PROMPT = "once upon a time"


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: it samples random bytes, most of them no text at all."""
    directory = build_tiny("qwen3", tmp_path_factory.mktemp("openai-model"), vocab_size=257, eos_token_id=256)
    byte_tokenizer(directory).save_pretrained(directory)
    return directory


@pytest.fixture
def server(model_directory: Path) -> Iterator[LiveServer]:
    with live_server(models=[model_directory], kv_cache_bytes=64 << 20) as server:
        yield server


@pytest.fixture
def model(server: LiveServer) -> str:
    return server.state.served.names[0]


@pytest.fixture
def connect(server: LiveServer) -> Iterator[Callable[..., openai.OpenAI]]:
    """Clients of the server, closed at the end."""
    with ExitStack() as clients:

        def connect(key: str = "none", face: str = "/v1") -> openai.OpenAI:
            return clients.enter_context(openai.OpenAI(base_url=server.url + face, api_key=key, max_retries=0))

        yield connect


@pytest.fixture
def client(connect: Callable[..., openai.OpenAI]) -> openai.OpenAI:
    return connect()


def trained(server: LiveServer, model: str, owner: str = "local", name: str = "v1") -> str:
    """The path of an adapter that has been trained a little."""
    engine = server.engine
    run = engine.create_model(engine.create_session(owner=owner), model, LoraConfig(rank=4, seed=0)).result()
    tokens = np.arange(8)
    datum = Datum(
        model_input=ModelInput.from_ints(tokens.tolist()),
        loss_fn_inputs={"target_tokens": tokens + 1, "weights": np.ones(8, dtype=np.float32)},
    )
    for _ in range(3):
        engine.forward_backward(run, [datum], "cross_entropy").result()
        engine.optim_step(run, AdamParams(learning_rate=0.1)).result()
    path = engine.save_weights_for_sampler(run, name).result().path
    assert path is not None
    return path


def sampled(server: LiveServer, model: str, prompt: str, **params: Any) -> tuple[str, list[float]]:
    """What the engine itself answers: text, without what ended it, and log-probabilities."""
    engine = server.engine
    where = {"model_path" if model.startswith("tinker://") else "base_model": model}
    sampler = engine.create_sampler(engine.create_session(), **where).result()
    tokenizer = engine.tokenizer(server.state.served.names[0])
    (answer,) = (
        engine.sample(sampler, ModelInput.from_ints(tokenizer.encode(prompt)), 1, SamplingParams(**params))
        .result()
        .sequences
    )
    assert answer.logprobs is not None
    kept = len(answer.tokens) - (answer.stop_reason == "stop")
    return tokenizer.decode(answer.tokens[:kept]), answer.logprobs[:kept]


def test_it_says_what_the_engine_samples(server: LiveServer, model: str, client: openai.OpenAI):
    text, logprobs = sampled(server, model, PROMPT, max_tokens=24, seed=5, temperature=0.7)
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=24, seed=5, temperature=0.7, logprobs=2
    ).choices[0]
    # Only an unfinished character at the end is left out of the text.
    assert text.startswith(answer.text)
    assert len(text) - len(answer.text) <= 3
    assert answer.logprobs is not None
    assert answer.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-6)
    assert answer.logprobs.top_logprobs is not None
    for chosen, top in zip(logprobs, answer.logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(min(top.values())) or len(top) == 2


@pytest.mark.parametrize("stop", [None, ["\ufffd"], ["e", "ab"]])
def test_a_stream_is_the_whole_in_pieces(model: str, client: openai.OpenAI, stop: list[str] | None):
    for seed in range(6):
        fields: dict[str, Any] = {
            "model": model,
            "messages": CHAT,
            "max_tokens": 40,
            "seed": seed,
            "n": 2,
            "stop": stop,
        }
        whole = client.chat.completions.create(**fields)
        texts, reasons = ["", ""], ["", ""]
        for chunk in client.chat.completions.create(**fields, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] += choice.finish_reason or ""
        assert texts == [choice.message.content for choice in whole.choices]
        assert reasons == [choice.finish_reason for choice in whole.choices]
        assert not any(s in text for s in stop or [] for text in texts)


def test_the_scores_of_an_echo_are_those_of_training(server: LiveServer, model: str, client: openai.OpenAI):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    tokens = server.engine.tokenizer(model).encode(PROMPT)
    datum = Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.ones(len(tokens) - 1, dtype=np.float32)},
    )
    engine = server.engine
    run = engine.create_model(engine.create_session(), model, LoraConfig(rank=4, seed=0)).result()
    (scored,) = engine.forward(run, [datum], "cross_entropy").result().loss_fn_outputs
    assert logprobs.token_logprobs[1:] == pytest.approx(scored["logprobs"].to_numpy().tolist(), abs=1e-5)
    assert logprobs.text_offset == list(range(len(PROMPT)))


def test_a_trained_checkpoint_is_a_model(server: LiveServer, model: str, client: openai.OpenAI):
    path = trained(server, model)
    assert [entry.id for entry in client.models.list()] == [model, path]
    assert client.models.retrieve(path).created > 1_700_000_000
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "logprobs": 0}
    tuned, base = (client.completions.create(model=name, **fields).choices[0] for name in (path, model))
    assert tuned.logprobs is not None
    assert base.logprobs is not None
    assert tuned.logprobs.token_logprobs == pytest.approx(
        sampled(server, path, PROMPT, max_tokens=16, temperature=0)[1], abs=1e-5
    )
    assert tuned.logprobs.token_logprobs != base.logprobs.token_logprobs
    client.completions.create(model=path.replace("tinker://", "mint://"), **fields)
    server.engine.store.delete_checkpoint(path)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=path, **fields)


def test_keys_and_their_checkpoints(server: LiveServer, model: str, connect: Callable[..., openai.OpenAI]):
    keys = server.engine.store.keys
    mine, secret = keys.create("me")
    _, other_secret = keys.create("other")
    server.state.auth.forget()
    path = trained(server, model, owner=mine.key_id)
    with pytest.raises(openai.AuthenticationError) as refused:
        connect("tml-wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        connect("tml-wrong").completions.create(model=model, prompt="x")
    me, other = connect(secret), connect(other_secret)
    assert path in [entry.id for entry in me.models.list()]
    assert path not in [entry.id for entry in other.models.list()]
    me.completions.create(model=path, prompt="x", max_tokens=2)
    with pytest.raises(openai.NotFoundError):
        other.completions.create(model=path, prompt="x")
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve(path)
    server.engine.store.as_owner(mine.key_id).publish(path)
    other.completions.create(model=path, prompt="x", max_tokens=2)


@pytest.mark.parametrize("face", ["/v1", "/oai/api/v1"])
def test_both_addresses(model: str, connect: Callable[..., openai.OpenAI], face: str):
    client = connect(face=face)
    assert client.completions.create(model=model, prompt="x", max_tokens=1).object == "text_completion"
    assert client.models.retrieve(model).id == model


def test_errors_of_the_engine_are_the_callers(model: str, client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="token"):
        client.completions.create(model=model, prompt=[5000])
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=model, prompt="x" * 600)
    assert long.value.code == "context_length_exceeded"
    for name in ("gpt-4", "~no-such-user/x", "a\0b", "/etc", "../..", "x" * 900):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=name, prompt="x")
    for path in ("tinker://", "tinker://a/b/c/d", "tinker://x/sampler_weights/..", "mint://a\0/sampler_weights/b"):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=path, prompt="x")


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_sampler(server: LiveServer, model: str, client: openai.OpenAI, stream: bool):
    fields: dict[str, Any] = {"model": model, "prompt": "x", "max_tokens": 500, "n": 64}
    if stream:
        with client.completions.create(**fields, stream=True) as chunks:
            next(chunks)
    else:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(**fields, timeout=0.3)
    deadline = time.monotonic() + 20
    while (stats := server.engine.stats()).samples_running and time.monotonic() < deadline:
        time.sleep(0.01)
    while (stats := server.engine.stats()).kv_cache_bytes_used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (stats.samples_running, stats.kv_cache_bytes_used) == (0, 0)
    assert stats.tokens_sampled < 64 * 500


async def _crowd(url: str, model: str, n: int) -> list[tuple[str, str]]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def one(seed: int) -> tuple[str, str]:
            fields: dict[str, Any] = {"model": model, "prompt": f"number {seed}", "max_tokens": 12, "seed": seed}
            whole, stream = await asyncio.gather(
                client.completions.create(**fields), client.completions.create(**fields, stream=True)
            )
            return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one(seed) for seed in range(n)))


def test_a_crowd_of_asynchronous_clients(server: LiveServer, model: str):
    answers = asyncio.run(_crowd(server.url, model, 40))
    assert all(whole == streamed for whole, streamed in answers)
    assert len({whole for whole, _ in answers}) > 30  # each got its own


@pytest.mark.slow
def test_smollm2_chats(smollm2_home: Path):
    with (
        live_server(models=["smollm2-135m"], home=smollm2_home) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        question: Any = [{"role": "user", "content": "Translate to French, with accents: the pupils eat at school."}]
        fields: dict[str, Any] = {"model": "smollm2-135m", "messages": question, "temperature": 0, "max_tokens": 40}
        answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=3)
        text = answer.choices[0].message.content
        tokenizer = server.engine.tokenizer("smollm2-135m")
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        assert text == sampled(server, "smollm2-135m", prompt, max_tokens=40, temperature=0)[0]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(tokenizer.encode(prompt))
        entries = answer.choices[0].logprobs and answer.choices[0].logprobs.content
        assert entries
        assert bytes(b for entry in entries for b in entry.bytes or []).decode() == text
        assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
        stop = text[5:12]  # somewhere across tokens
        cut = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**fields, stop=stop, stream=True)
        )
        assert cut == text[: text.index(stop)]
