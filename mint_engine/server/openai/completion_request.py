"""The body of POST completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from mint_engine.server.openai.fields import MAX_TOP_LOGPROBS, Common, Only, sendable

MAX_PROMPTS = 2048
DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or several, each a text or token ids, as a list."""
    if value is None or isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value or ""]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"expected a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these")
    for i, prompt in enumerate(value):
        if isinstance(prompt, str):
            sendable(prompt)
            continue
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(f"expected a string or a non-empty list of token ids (prompt {i})")
        for token in prompt:
            if type(token) is not int or not 0 <= token < 2**31:
                raise ValueError(f"expected token ids, got {token!r:.40} (prompt {i})")
    return value


_Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_Several = Annotated[list[str] | list[_Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
Prompts = Annotated[list[Prompt], BeforeValidator(_prompts, json_schema_input_type=str | _Tokens | _Several | None)]


class CompletionRequest(Common):
    """See OpenAI's reference for the meaning of each field; those without effect say so."""

    prompt: Prompts = Field(default=None, validate_default=True)
    max_tokens: int | None = Field(default=None, ge=0, description="Default 16. 0, with echo, only scores the prompt.")
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1)

    suffix: Annotated[Any, Only("")] = None

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.best_of not in (None, self.samples):
            raise ValueError(f"best_of: only best_of = n is supported by this server, got {self.best_of}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: expected at least 1 (0 only together with echo)")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed together with stream")
        if len(self.prompt) * self.samples > MAX_PROMPTS:
            raise ValueError(f"n: expected at most {MAX_PROMPTS} choices in all, got {len(self.prompt)} x {self.n}")
        return self

    @property
    def tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
