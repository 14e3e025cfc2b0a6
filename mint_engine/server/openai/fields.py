"""What the two request bodies have in common, and what becomes of fields this server does not act on.

Unknown fields are refused. So are OpenAI's fields that would change the answer if they were honoured, unless they have
a value that asks for nothing. Fields that only concern OpenAI's own operation are accepted and have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import core_schema

from mint_engine.types import SamplingParams

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_N = 128
MAX_TOP_LOGPROBS = 20

NoEffect = Annotated[Any, Field(description="Accepted; has no effect here.")]


class Only:
    """On a field that is not supported: null and ``neutral`` values, which ask for nothing, are accepted."""

    def __init__(self, *neutral: Any) -> None:
        self._neutral = neutral

    def check(self, value: Any) -> Any:
        if value is None or value in self._neutral:
            return value
        but = f" (only {', '.join(map(repr, self._neutral))} or null)" if self._neutral else ""
        raise ValueError(f"not supported by this server{but}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self._neutral, None], "description": "Not supported here."}


class Body(BaseModel):
    """Base of everything a request is made of."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage counts.")
    include_obfuscation: NoEffect = None


def sendable(text: str) -> str:
    """JSON can spell lone surrogates; UTF-8, which tokenizers read and answers are written in, has none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid text: a lone surrogate at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(sendable)]


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("expected a non-empty string, or a list of them")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"expected at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
    return [sendable(stop) for stop in stops]


_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_Input = _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None
Stops = Annotated[list[str], BeforeValidator(_stops, json_schema_input_type=_Input)]


class Common(Body):
    """Sampling, as both endpoints know it. `top_k` is ours: -1 or null is off."""

    model: Text = Field(
        max_length=1024, description="A base model that is served, or the tinker:// or mint:// path of a checkpoint."
    )
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stops = Field(default_factory=list, description="The text ends before any of these; they are not in it.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    frequency_penalty: Annotated[Any, Only(0)] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, Only({})] = None

    user: NoEffect = None

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, max_tokens: int | None) -> SamplingParams:
        # top_p 0 keeps the most likely token alone, which to the engine is top_k 1.
        top_p = 1.0 if self.top_p is None else self.top_p
        top_k = self.top_k or -1
        return SamplingParams(
            max_tokens=max_tokens,
            seed=self.seed,
            stop=self.stop or None,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=1 if top_p == 0 else top_k,
            top_p=top_p or 1.0,
        )
