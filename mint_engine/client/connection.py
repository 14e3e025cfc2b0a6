"""Where a client's engine is: in this process, or behind a URL. Reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from mint_engine.client.remote import RemoteEngine, address_of, connect, same_origin
from mint_engine.errors import UserError

if TYPE_CHECKING:
    from mint_engine.client.protocol import ClientEngine, Registry

DEFAULT_BASE_MODEL = "Qwen/Qwen3-0.6B"
DEFAULT_RANK = 16

_Model = TypeVar("_Model", bound=BaseModel)


def open_engine(
    *, base_url: str | None, api_key: str | None, dtype: str | None, device: str | None = None,
    http_options: Mapping[str, Any] | None = None,
) -> ClientEngine:  # fmt: skip
    """The engine on the server that `base_url` or MINT_BASE_URL names; without either, this process's own.

    `http_options`: see `address_of`. An engine in the process has no use for them.
    """
    url = base_url or os.environ.get("MINT_BASE_URL")
    if url:
        if dtype is not None:
            raise UserError(f"dtype: expected None for the server {url}, which has its own, got {dtype!r}")
        if device is not None:
            raise UserError(f"device: expected None for the server {url}, which has its own, got {device!r}")
        return connect(address_of(url, api_key, http_options))
    from mint_engine.engine import get_engine  # imports torch: a client of a server can do without

    return get_engine(dtype, device=device)


def check_key_may_go(url: str) -> None:
    """Raises UserError if MINT_API_KEY would go to a server that somebody else has chosen."""
    own = os.environ.get("MINT_BASE_URL")
    if os.environ.get("MINT_API_KEY") and not (own and same_origin(url, own)):
        raise UserError(
            f"api_key: expected one for {url}, which the handle names, got None: MINT_API_KEY is for "
            f"{own or 'a server that MINT_BASE_URL would name'}"
        )


def registry_of(engine: ClientEngine) -> Registry:
    """What is stored where `engine` is."""
    if isinstance(engine, RemoteEngine):
        return engine.registry
    from mint_engine.client.local import LocalRegistry

    return LocalRegistry(engine)  # type: ignore[arg-type]  # there are two kinds of engine


def access_token(engine: ClientEngine, token: str | None) -> dict[str, str]:
    """The argument for a server that asks for a token to read somebody else's weights. No other engine asks."""
    return {"weights_access_token": token} if token is not None and isinstance(engine, RemoteEngine) else {}


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
