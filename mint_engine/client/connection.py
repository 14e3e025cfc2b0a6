"""Where a client's engine is: in this process, or behind a URL. Reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from mint_engine.client.remote import RemoteEngine, address_of, check_http_options, connect, same_origin
from mint_engine.errors import UserError

if TYPE_CHECKING:
    from mint_engine.client.protocol import ClientEngine, Registry

DEFAULT_BASE_MODEL = "Qwen/Qwen3-0.6B"
DEFAULT_RANK = 16

_Model = TypeVar("_Model", bound=BaseModel)


def open_engine(
    *, base_url: str | None = None, api_key: str | None = None, dtype: str | None = None, device: str | None = None,
    http_options: Mapping[str, Any] | None = None,
) -> ClientEngine:  # fmt: skip
    """The engine on the server that `base_url` or MINT_BASE_URL names; without either, this process's own.

    `http_options`: see `address_of`. An engine in the process sends no requests: there is nothing to apply them to, and
    they are checked all the same.
    """
    url = base_url or os.environ.get("MINT_BASE_URL")
    if url:
        if dtype is not None:
            raise UserError(f"dtype: expected None for the server {url}, which has its own, got {dtype!r}")
        if device is not None:
            raise UserError(f"device: expected None for the server {url}, which has its own, got {device!r}")
        return connect(address_of(url, api_key, http_options))
    check_http_options(http_options or {})
    from mint_engine.engine import get_engine  # imports torch: a client of a server can do without

    return get_engine(dtype, device=device)


def engine_of(engine: ClientEngine | None, **options: Any) -> ClientEngine:
    """`engine`, or the one that `open_engine(**options)` finds. Raises UserError if both are said: the options are of
    connections and engines that are made here, and a given engine has its own."""
    if engine is None:
        return open_engine(**options)
    if given := sorted(name for name, value in options.items() if value is not None):
        raise UserError(f"engine: expected an engine, or what one is made of, got both: engine and {', '.join(given)}")
    return engine


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


def address_of_record(engine: ClientEngine, *parts: str) -> str:
    """Where one finds what is recorded of something: an address of the server, or the home of this process's engine."""
    if isinstance(engine, RemoteEngine):
        return f"{engine.address.url}/api/v1/{'/'.join(parts)}"
    home: Path = engine.store.home  # type: ignore[attr-defined]  # there are two kinds of engine
    return home.resolve().as_uri()


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
