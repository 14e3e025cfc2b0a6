"""What every JSON request body has in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mint_engine.errors import UserError
from mint_engine.wire.errors import WireError, explain
from mint_engine.wire.json_values import LONGEST_NAME

MAX_SECONDS = 10 * 366 * 24 * 3600
_METADATA_BYTES = 64 * 1024

Request = TypeVar("Request", bound=BaseModel)
Checked = TypeVar("Checked", bound=BaseModel)


def without_nulls(values: Any) -> Any:
    """An object without the keys whose value is null."""
    return {k: v for k, v in values.items() if v is not None} if isinstance(values, Mapping) else values


class WireRequest(BaseModel):
    """A request body. Keys that are not known are ignored, and null is the same as a key that is not there: newer and
    older clients than those we know keep working."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return without_nulls(values)


def parse_request(model: type[Request], obj: Any) -> Request:
    """`obj` (parsed JSON) as a `model`. Raises WireError with one readable sentence."""
    try:
        return model.model_validate(obj)
    except ValidationError as error:
        raise WireError(explain(error.errors(include_url=False, include_context=False))) from None


def checked(model: type[Checked], values: Mapping[str, Any], name: str) -> Checked:
    """One of our own types from the values of a request. Raises UserError with one sentence that names `name`."""
    try:
        return model(**values)
    except ValidationError as error:
        complaints = error.errors(include_url=False, include_context=False)
        raise UserError(explain([c | {"loc": (name, *c["loc"])} for c in complaints])) from None


def _metadata(value: Any) -> Any:
    """Strings by name. A value that is no string becomes its JSON."""
    if not isinstance(value, Mapping):
        return value
    texts = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in value.items()}
    for text in (*texts, *texts.values()):
        if isinstance(text, str) and "\0" in text:
            raise ValueError("expected text without NUL characters")
    try:
        size = len(json.dumps(texts, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise ValueError("expected text that is valid Unicode") from None
    if size > _METADATA_BYTES:
        raise ValueError(f"expected at most {_METADATA_BYTES} bytes, got {size}")
    return texts


Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""An id, a path, the name of something: short, and without control characters."""

Metadata: TypeAlias = Annotated[dict[str, str], BeforeValidator(_metadata)]
"""What a user attaches to a session, a run or a checkpoint."""

SeqId: TypeAlias = Annotated[int, Field(ge=1, lt=2**53)]
"""The place of a request among those of its model, from 1."""

Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**53)]

Seconds: TypeAlias = Annotated[int, Field(ge=1, le=MAX_SECONDS)]
"""A time to live: up to ten years."""
