"""Where a client's engine is: in this process, or (in a later version) behind a URL. Reads the environment."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mint_engine.engine import Engine, get_engine
from mint_engine.errors import TransportError, UserError

DEFAULT_BASE_MODEL = "Qwen/Qwen3-0.6B"
DEFAULT_RANK = 16

_Model = TypeVar("_Model", bound=BaseModel)


def open_engine(*, base_url: str | None, dtype: str | None) -> Engine:
    """The process's engine. Raises TransportError if `base_url` or MINT_BASE_URL names a server."""
    url = base_url or os.environ.get("MINT_BASE_URL")
    if url:
        source = "base_url" if base_url else "MINT_BASE_URL"
        raise TransportError(
            f"{source} is {normalize_url(url)}: this version runs in the process only and cannot talk to a server. "
            f"{'Leave out base_url' if base_url else 'Unset MINT_BASE_URL'} to run here."
        )
    return get_engine(dtype)


def normalize_url(url: str) -> str:
    """With a scheme (https if there is none) and without a trailing slash."""
    return (url if "://" in url else f"https://{url}").rstrip("/")


def default_base_model() -> str:
    return os.environ.get("MINT_BASE_MODEL") or DEFAULT_BASE_MODEL


def default_rank() -> int:
    text = os.environ.get("MINT_LORA_RANK")
    if not text:
        return DEFAULT_RANK
    try:
        return int(text)
    except ValueError:
        raise UserError(f"MINT_LORA_RANK: expected an integer, got {text!r}") from None


def build(model: type[_Model], **fields: Any) -> _Model:
    """`model(**fields)`, with the first thing that is wrong in one line."""
    try:
        return model(**fields)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or model.__name__
        got = f", got {problem['input']!r}" if problem["loc"] else ""
        raise UserError(f"{where}: {problem['msg'].removeprefix('Value error, ')}{got}") from None


def check_metadata(user_metadata: Any) -> None:
    if user_metadata is None:
        return
    if not isinstance(user_metadata, dict) or not all(isinstance(x, str) for kv in user_metadata.items() for x in kv):
        raise UserError(f"user_metadata: expected a dict of strings, got {user_metadata!r}")
