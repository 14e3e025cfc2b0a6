"""The body of POST chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mint_engine.server.openai.fields import MAX_TOP_LOGPROBS, Body, Common, NoEffect, Only, Text


def _text(value: Any) -> Any:
    """The content of a message as one string; parts of text are put on lines of their own."""
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise ValueError(f"expected parts of type 'text', got {kind!r:.40} (part {i}): this server takes text only")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"expected a string as text (part {i})")
        texts.append(part["text"])
    return "\n".join(texts)


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = Annotated[Text | None, BeforeValidator(_text, json_schema_input_type=str | list[TextPart] | None)]


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn. What the chat template does not print is lost; `name` and `reasoning_content` depend on it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    # Answers come back as they were given, with these empty.
    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None

    @model_validator(mode="after")
    def _something_said(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: expected a string or a list of text parts")
        return self


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Any, Only(False)] = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChatRequest(Common):
    """See OpenAI's reference for the meaning of each field; those without effect say so.

    `chat_template_kwargs` is ours: variables for the model's chat template, such as `enable_thinking`.
    """

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Default: up to the model's context.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(
        default=None, description="Told to the model by its chat template. It answers in its own words, in `content`."
    )
    tool_choice: Annotated[Any, Only("auto", "none")] = None
    chat_template_kwargs: dict[str, Any] | None = None

    parallel_tool_calls: Annotated[Any, Only(True)] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    modalities: Annotated[Any, Only(["text"])] = None
    reasoning_effort: Annotated[Any, Only()] = None
    verbosity: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("auto", "none")] = None

    store: NoEffect = None
    metadata: NoEffect = None
    service_tier: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_options: NoEffect = None
    prompt_cache_retention: NoEffect = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed together with stream")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed together with logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: expected the same as max_completion_tokens, or one of them only")
        return self

    @property
    def tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
