"""The two endpoints as the `openai` package sees them, over a real socket, on an engine that says what it is told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_fakes import CONTEXT, VOCAB, ScriptedEngine, byte_tokenizer, fake_app, serving

from mint_engine.errors import UserError
from mint_engine.server.openai.vocabulary import Vocabulary

CHAT: Any = [{"role": "user", "content": "hi"}]
PATH = "tinker://run/sampler_weights/v1"


@pytest.fixture
def engine(tmp_path: Path) -> ScriptedEngine:
    return ScriptedEngine(byte_tokenizer(tmp_path))


@pytest.fixture
def checkpoints() -> dict[str, str]:
    return {PATH: "/store/v1"}


@pytest.fixture
def client(engine: ScriptedEngine, checkpoints: dict[str, str]) -> Iterator[openai.OpenAI]:
    with (
        serving(fake_app(engine, checkpoints)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def chat_text(client: openai.OpenAI, **fields: Any) -> tuple[list[str], list[str]]:
    """(texts, finish reasons) of the choices, put together from a stream."""
    n = fields.get("n", 1)
    texts, reasons = [""] * n, [""] * n
    for chunk in client.chat.completions.create(model="tiny", messages=CHAT, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            assert not reasons[choice.index], "nothing comes after the end"
            reasons[choice.index] = choice.finish_reason or ""
    return texts, reasons


def test_a_chat_completion(client: openai.OpenAI):
    answer = client.chat.completions.create(model="tiny", messages=CHAT)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello", "stop")
    assert choice.logprobs is None
    prompt = len("<user>hi\n<assistant>")
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 6, prompt + 6)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 1
    assert answer.system_fingerprint
    assert answer.id != client.chat.completions.create(model="tiny", messages=CHAT).id


def test_a_completion(client: openai.OpenAI, engine: ScriptedEngine):
    answer = client.completions.create(model="tiny", prompt="say: ", max_tokens=3)
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hel", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    client.completions.create(model="tiny", prompt="say: ")
    assert engine.calls[-1].params.max_tokens == 16  # OpenAI's default


@pytest.mark.parametrize(
    ("said", "fields", "text", "reason"),
    [
        ("héllo €uro 🎉!".encode(), {}, "héllo €uro 🎉!", "stop"),
        (b"one END two", {"stop": "END"}, "one ", "stop"),
        (b"one END two", {"stop": ["nothing", " EN"]}, "one", "stop"),
        (b"one EN", {"stop": ["END"]}, "one EN", "stop"),
        ("a€".encode(), {"max_tokens": 3}, "a", "length"),
        ("1€2".encode(), {"stop": "€"}, "1", "stop"),
        (b"bad \xff\xe2 bytes", {}, "bad \ufffd\ufffd bytes", "stop"),
        (b"", {}, "", "stop"),
    ],
)
def test_a_stream_says_what_the_whole_says(
    client: openai.OpenAI, engine: ScriptedEngine, said: bytes, fields: dict[str, Any], text: str, reason: str
):
    engine.script = [said]
    whole = client.chat.completions.create(model="tiny", messages=CHAT, **fields).choices[0]
    assert (whole.message.content, whole.finish_reason) == (text, reason)
    assert chat_text(client, **fields) == ([text], [reason])


def test_each_choice_of_a_stream_is_its_own(client: openai.OpenAI, engine: ScriptedEngine):
    engine.script = [b"first", "zw€it".encode(), b"third END x"]
    assert chat_text(client, n=3, stop="END") == (["first", "zw€it", "third "], ["stop"] * 3)


def test_the_parts_of_a_chat_stream(client: openai.OpenAI, engine: ScriptedEngine):
    engine.script = [b"ab"]
    chunks = list(
        client.chat.completions.create(model="tiny", messages=CHAT, stream=True, stream_options={"include_usage": True})
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-2]] == ["a", "b"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_a_stream_ends_with_done(client: openai.OpenAI):
    body = {"model": "tiny", "prompt": "x", "stream": True}
    answer = httpx.post(f"{client.base_url}completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_chat_logprobs(client: openai.OpenAI, engine: ScriptedEngine):
    engine.script = ["é!".encode()]
    fields: dict[str, Any] = {"model": "tiny", "messages": CHAT, "logprobs": True}
    answer = client.chat.completions.create(**fields, top_logprobs=2).choices[0]
    assert answer.logprobs is not None
    entries = answer.logprobs.content
    assert entries is not None
    assert [entry.token for entry in entries] == [r"\xc3", r"\xa9", "!"]
    assert bytes(b for entry in entries for b in entry.bytes or []).decode() == answer.message.content
    assert [entry.logprob for entry in entries] == [-1.0, -2.0, -3.0]
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [[-1, -2], [-2, -3], [-3, -4]]
    for top in (0, 2):  # the same in a stream, with alternatives (which come late) and without
        streamed = [
            entry
            for chunk in client.chat.completions.create(**fields, top_logprobs=top, stream=True)
            for entry in (chunk.choices[0].logprobs.content or [] if chunk.choices[0].logprobs else [])
        ]
        assert [entry.logprob for entry in streamed] == [-1.0, -2.0, -3.0]
        assert [len(entry.top_logprobs) for entry in streamed] == [top] * 3


def test_completion_logprobs(client: openai.OpenAI, engine: ScriptedEngine):
    engine.script = ["é!END".encode()]
    answer = client.completions.create(model="tiny", prompt="p: ", logprobs=1, stop="END").choices[0]
    logprobs = answer.logprobs
    assert logprobs is not None
    assert logprobs.tokens == [r"bytes:\xc3", r"bytes:\xa9", "!"]
    assert logprobs.token_logprobs == [-1.0, -2.0, -3.0]
    assert logprobs.text_offset == [3, 3, 4]  # from the beginning of the prompt
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[2] == {"!": -3.0}
    alone = client.completions.create(model="tiny", prompt="p: ", logprobs=0, stop="END").choices[0].logprobs
    assert alone is not None
    assert alone.top_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_scores(client: openai.OpenAI, stream: bool):
    fields: dict[str, Any] = {"model": "tiny", "prompt": "aé", "echo": True, "logprobs": 1, "max_tokens": 2, "n": 2}
    texts, tokens, scores, offsets = ["", ""], [[], []], [[], []], [[], []]
    answers: Any = client.completions.create(**fields, stream=stream)
    for answer in answers if stream else [answers]:
        for choice in answer.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens
                scores[choice.index] += choice.logprobs.token_logprobs
                offsets[choice.index] += choice.logprobs.text_offset
    assert texts == ["aéhe"] * 2
    assert tokens == [["a", r"bytes:\xc3", r"bytes:\xa9", "h", "e"]] * 2
    assert scores == [[None, -0.5, -0.5, -1.0, -2.0]] * 2
    assert offsets == [[0, 1, 1, 2, 3]] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_prompt_alone(client: openai.OpenAI, engine: ScriptedEngine, stream: bool):
    fields: dict[str, Any] = {"model": "tiny", "prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 0}
    answers: Any = client.completions.create(**fields, stream=stream)
    choices = [choice for answer in (answers if stream else [answers]) for choice in answer.choices]
    assert "".join(choice.text for choice in choices) == "ab"
    assert choices[-1].finish_reason == "length"
    assert [s for choice in choices if choice.logprobs for s in choice.logprobs.token_logprobs] == [None, -0.5]
    assert engine.calls[-1].num_samples == 0


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(client: openai.OpenAI, engine: ScriptedEngine, stream: bool):
    engine.script = [b"x", b"y"]
    fields: dict[str, Any] = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "echo": True}
    answers: Any = client.completions.create(**fields, stream=stream)
    texts = [""] * 4
    for answer in answers if stream else [answers]:
        for choice in answer.choices:
            texts[choice.index] += choice.text
    assert texts == ["ax", "ay", "bx", "by"]


def test_token_prompts_and_empty_ones(client: openai.OpenAI, engine: ScriptedEngine):
    ids = engine.ids("zü".encode())
    assert client.completions.create(model="tiny", prompt=ids, echo=True).choices[0].text == "zühello"
    assert engine.calls[-1].prompt == ids
    client.completions.create(model="tiny", prompt="")
    assert engine.calls[-1].prompt == [256]  # the beginning of a document


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_engine_may_refuse(client: openai.OpenAI, engine: ScriptedEngine, stream: bool, kind: str):
    engine.refusal = UserError("prompt: not like this")
    create: Callable[..., Any] = client.chat.completions.create if kind == "chat" else client.completions.create
    prompt: dict[str, Any] = {"messages": CHAT} if kind == "chat" else {"prompt": ["x", "y"], "echo": True}
    with pytest.raises(openai.BadRequestError, match="not like this"):
        create(model="tiny", stream=stream, **prompt)


def test_a_failure_in_the_middle_of_a_stream_is_an_event(client: openai.OpenAI, engine: ScriptedEngine):
    engine.failure = RuntimeError("secret details")
    chunks = client.chat.completions.create(model="tiny", messages=CHAT, stream=True)
    text = "".join(next(chunks).choices[0].delta.content or "" for _ in range(6))
    assert text == "hello"
    with pytest.raises(openai.APIError) as caught:
        next(chunks)
    assert "secret" not in str(caught.value.body)


def test_models_are_bases_and_the_callers_checkpoints(client: openai.OpenAI):
    assert [(model.id, model.owned_by) for model in client.models.list()] == [
        ("tiny", "mint-engine"),
        (PATH, "someone"),
    ]
    for name in ("tiny", PATH, PATH.replace("tinker://", "mint://")):
        assert client.models.retrieve(name).id == name.replace("mint://", "tinker://")
    for name in ("gpt-4", PATH + "x"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_errors_as_the_package_knows_them(client: openai.OpenAI, engine: ScriptedEngine):
    with pytest.raises(openai.NotFoundError, match="served are: tiny") as missing:
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tinker://run/sampler_weights/other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: not supported") as refused:
        client.completions.create(model="tiny", prompt="x", frequency_penalty=1.0)
    assert (refused.value.param, refused.value.type) == ("frequency_penalty", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="nonsense: unknown field"):
        client.completions.create(model="tiny", prompt="x", extra_body={"nonsense": 1})
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 500, max_tokens=50)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="characters"):
        client.completions.create(model="tiny", prompt="x" * (CONTEXT * 20))
    with pytest.raises(openai.BadRequestError, match="prompt: expected at most 4 prompts in a request, got 5"):
        client.completions.create(model="tiny", prompt=["x"] * 5)
    # The engine would refuse them too, but not before their text had been looked up and kept.
    refusal = rf"prompt: expected token ids in \[0, {VOCAB}\), got {2**31 - 1} at index 1 \(prompt 1\)"
    with pytest.raises(openai.BadRequestError, match=refusal) as unknown:
        client.completions.create(model="tiny", prompt=[[1, VOCAB - 1], [1, 2**31 - 1]])
    assert unknown.value.param == "prompt"
    assert engine.calls == []
    engine.waiting = 1
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt=["x"] * 4)
    engine.waiting = 4
    with pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(model="tiny", prompt="x")
    assert busy.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("where", ["tools", "tool_calls", "chat_template_kwargs"])
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(
    client: openai.OpenAI, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, where: str
):
    engine.tokens.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
        "{% endfor %}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ extra }}"
    )
    long = "x" * (CONTEXT * 20)
    messages: Any = CHAT
    if where == "tool_calls":
        call = {"id": "1", "type": "function", "function": {"name": long, "arguments": ""}}
        messages = [*CHAT, {"role": "assistant", "tool_calls": [call]}]
    tools: Any = [{"type": "function", "function": {"name": long}}] if where == "tools" else openai.NOT_GIVEN
    extra = {"chat_template_kwargs": {"extra": long}} if where == "chat_template_kwargs" else {}
    monkeypatch.setattr(Vocabulary, "encode", None)
    with pytest.raises(openai.BadRequestError, match=r"messages: .* has \d{5,} characters") as refused:
        client.chat.completions.create(model="tiny", messages=messages, tools=tools, extra_body=extra)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


def test_bodies_that_are_no_json(client: openai.OpenAI):
    for body in (b"{", b"", b"[]", b"\xff\xfe", b'{"model": "tiny", "prompt": ' + b"[" * 100_000):
        answer = httpx.post(f"{client.base_url}completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_that_is_not_announced_as_json_is_refused_by_that_name(client: openai.OpenAI, kind: str | None):
    headers = {} if kind is None else {"content-type": kind}  # curl -d sends the first
    answer = httpx.post(f"{client.base_url}completions", content=b'{"model": "tiny", "prompt": "x"}', headers=headers)
    assert (answer.status_code, answer.json()["error"]["message"]) == (415, "Content-Type: expected application/json")


@pytest.mark.parametrize("body", [b"", b"[]", b"3"])
def test_a_body_that_is_no_object_is_refused_by_that_name(client: openai.OpenAI, body: bytes):
    answer = httpx.post(f"{client.base_url}completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "body: expected a JSON object")


def test_a_lone_surrogate_is_refused_and_not_sent_back(client: openai.OpenAI):
    url = f"{client.base_url}completions"
    for body in (rb'{"model": "\ud800", "prompt": "x"}', rb'{"model": "tiny", "\ud800": 1, "prompt": "x"}'):
        answer = httpx.post(url, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400


def test_who_hangs_up_is_cancelled(client: openai.OpenAI, engine: ScriptedEngine):
    engine.hold = threading.Event()  # the engine waits after its first token
    with client.chat.completions.create(model="tiny", messages=CHAT, stream=True) as stream:
        next(stream)
    assert engine.cancelled.wait(10)
    engine.hold.set()


def test_who_hangs_up_before_the_answer_is_cancelled(client: openai.OpenAI, engine: ScriptedEngine):
    engine.hold = threading.Event()
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="tiny", messages=CHAT, timeout=0.5)
    assert engine.cancelled.wait(10)
    engine.hold.set()


def test_a_finished_answer_cancels_nothing(client: openai.OpenAI, engine: ScriptedEngine):
    engine.script = [b"one END two"]
    client.chat.completions.create(model="tiny", messages=CHAT)
    chat_text(client, n=2)
    assert not engine.cancelled.is_set()


def test_a_stop_the_engine_does_not_see_ends_it(client: openai.OpenAI, engine: ScriptedEngine):
    # The scripted engine ignores stop strings: it is told to give up, and the client does not wait for it.
    engine.script = [b"one END two three"]
    engine.hold, engine.hold_after = engine.cancelled, 10
    assert chat_text(client, stop="END") == (["one "], ["stop"])
    assert engine.cancelled.wait(10)


def test_a_server_that_stops_refuses_what_has_not_begun(engine: ScriptedEngine):
    engine.hold, engine.hold_after = threading.Event(), 0
    app = fake_app(engine)
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        def stop() -> None:
            assert engine.started.wait(10)
            engine.loop.call_soon_threadsafe(app.state.mint.promises.on_stop[0])

        stopping = threading.Thread(target=stop)
        stopping.start()
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model="tiny", messages=CHAT)
        stopping.join(10)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "1"
        engine.hold.set()


def test_one_sampler_per_version(client: openai.OpenAI, engine: ScriptedEngine, checkpoints: dict[str, str]):
    def ask(model: str) -> None:
        client.completions.create(model=model, prompt="x")

    for _ in range(2):
        ask(PATH)
        ask(PATH.replace("tinker://", "mint://"))
    assert len(engine.made) == 1
    checkpoints[PATH] = "/store/v1-again"  # overwritten
    ask(PATH)
    assert len(engine.made) == 2
    ask("tiny")  # room for two: the least recently used goes
    assert engine.released == ["session:sample:1"]
    engine.released.append("session:sample:2")  # somebody else let it go
    ask(PATH)
    assert len(engine.made) == 4
    del checkpoints[PATH]
    with pytest.raises(openai.NotFoundError):
        ask(PATH)


async def _answers(url: str) -> tuple[str, str]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model="tiny", messages=CHAT)
        streamed = ""
        async for chunk in await client.chat.completions.create(model="tiny", messages=CHAT, stream=True):
            streamed += chunk.choices[0].delta.content or ""
        return whole.choices[0].message.content or "", streamed


def test_the_asynchronous_client(client: openai.OpenAI):
    assert asyncio.run(_answers(str(client.base_url))) == ("hello", "hello")
