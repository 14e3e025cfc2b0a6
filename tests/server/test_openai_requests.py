"""What the bodies accept: everything OpenAI's clients send that we act on; the rest is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from mint_engine.server.openai.chat_request import ChatRequest
from mint_engine.server.openai.completion_request import CompletionRequest
from mint_engine.server.openai.errors import ApiError, as_api_error

HI = [{"role": "user", "content": "hi"}]


def refusal(kind: type, **fields: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        kind(**{"model": "m", **({"messages": HI} if kind is ChatRequest else {"prompt": "p"}), **fields})
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return as_api_error(RequestValidationError(errors))


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", 1),
        ("logit_bias", {"5": 100}),
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["a", 5]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 257),
        ("stop", "\ud800"),
        ("model", "\ud800"),
        ("stream", "yes"),
        ("max_tokens", -1),
        ("nonsense", 1),
        ("logprobs", "many"),
    ],
)
def test_a_wrong_field_is_named(kind: type, field: str, value: Any):
    error = refusal(kind, **{field: value})
    assert error.status == 400
    assert error.param == field
    assert error.message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("reasoning_effort", "high"),
        ("modalities", ["text", "audio"]),
        ("functions", [{"name": "f"}]),
        ("prediction", {"type": "content", "content": "x"}),
        ("parallel_tool_calls", False),
        ("web_search_options", {}),
        ("verbosity", "low"),
    ],
)
def test_what_chat_cannot_do_is_refused(field: str, value: Any):
    error = refusal(ChatRequest, **{field: value})
    assert error.param == field
    assert "not supported by this server" in error.message


def test_fields_that_concern_openai_only_have_no_effect():
    ignored = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "flex",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    neutral = {
        "frequency_penalty": 0.0,
        "presence_penalty": None,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "stop": None,
        "n": None,
        "max_tokens": None,
    }
    plain = ChatRequest(model="m", messages=HI)
    noisy = ChatRequest(model="m", messages=HI, **ignored, **neutral)
    assert noisy.sampling_params(noisy.tokens) == plain.sampling_params(plain.tokens)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (None, [""]),
        ("", [""]),
    ],
)
def test_prompts_of_every_kind(prompt: Any, read: list[Any]):
    assert CompletionRequest(model="m", prompt=prompt).prompt == read
    assert CompletionRequest(model="m").prompt == [""]


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [1.5], [-1], [2**31], 5, [True, False], {"a": 1}, ["\ud800"]])
def test_prompts_that_are_none(prompt: Any):
    error = refusal(CompletionRequest, prompt=prompt)
    assert error.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"n": 128, "prompt": ["p"] * 100}, "n"),
    ],
)
def test_completion_fields_that_do_not_go_together(fields: dict[str, Any], param: str):
    assert refusal(CompletionRequest, **fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages.0.colour"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages.0.content"),
    ],
)
def test_chat_fields_that_are_wrong(fields: dict[str, Any], param: str):
    assert refusal(ChatRequest, **fields).param == param


def test_parts_of_text_are_put_together():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest(model="m", messages=[{"role": "user", "content": parts}])
    assert request.messages[0].content == "a\nb"


def test_an_answer_may_be_sent_back_as_it_came():
    # What `message.model_dump()` of the openai package gives.
    echoed = {
        "role": "assistant",
        "content": "hello",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert ChatRequest(model="m", messages=[*HI, echoed]).messages[1].content == "hello"


def test_sampling_parameters():
    params = ChatRequest(model="m", messages=HI, temperature=0, top_p=0, seed=3, stop="x").sampling_params(7)
    assert (params.temperature, params.top_k, params.top_p, params.seed, params.max_tokens) == (0.0, 1, 1.0, 3, 7)
    assert params.stop_strings == ["x"]
    default = CompletionRequest(model="m", prompt="p", stop=[])
    assert default.sampling_params(default.tokens).stop is None  # an empty list stops at the end of the sequence
    assert default.tokens == 16
