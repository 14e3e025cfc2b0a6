"""Where a server is and how to talk to it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from mint_engine.errors import UserError


@dataclass(frozen=True)
class Address:
    """One server as one user sees it; connections are shared by equal addresses.

    url: with a scheme, without a trailing slash. timeout: seconds to wait for an answer (not for a result: those are
    waited for as long as they take). max_retries: None = as long as it makes sense.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    query: tuple[tuple[str, str], ...] = ()
    timeout: float = 60.0
    max_retries: int | None = None

    @property
    def is_loopback(self) -> bool:
        return _is_loopback(urlsplit(self.url).hostname or "")


def address_of(url: str, api_key: str | None = None, options: Mapping[str, Any] | None = None) -> Address:
    """An address from what a user gives: `options` are those of the SDKs' HTTP clients.

    Raises:
        UserError: the URL is none, or an option cannot be honoured.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    if "http_client" in given:
        raise UserError("http_client: expected None: mint-engine makes its own connections")
    headers = {**_strings("default_headers", given), **_strings("default_headers_overrides", given)}
    key = api_key if api_key is not None else os.environ.get("MINT_API_KEY")
    if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable()):
        raise UserError("api_key: expected printable ASCII characters")
    return Address(
        url=normalize_url(url),
        api_key=key or None,
        headers=tuple(sorted(headers.items())),
        query=tuple(sorted(_strings("default_query", given).items())),
        timeout=_seconds(given.get("timeout", 60.0)),
        max_retries=_count(given.get("max_retries")),
    )


def normalize_url(url: str) -> str:
    """With a scheme and without a trailing slash. Without one it is https, and http on this machine.

    Raises UserError if it is no address of a server.
    """
    if not isinstance(url, str):
        raise UserError(f"base_url: expected a string, got {type(url).__name__}")
    bare = url.strip()
    if "://" not in bare:
        host = urlsplit(f"//{bare}").hostname or ""
        bare = f"{'http' if _is_loopback(host) else 'https'}://{bare}"
    try:
        parts = urlsplit(bare)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        _ = parts.port  # raises for one that is no number
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"base_url: expected http(s)://host[:port][/path], got {url!r}")
    return bare.rstrip("/")


def same_origin(url: str, other: str) -> bool:
    """Whether both name one server: scheme, host and port. Raises UserError for what is no address."""
    return _origin(url) == _origin(other)


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(normalize_url(url))
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _strings(name: str, given: Mapping[str, Any]) -> dict[str, str]:
    value = given.get(name, {})
    if not isinstance(value, Mapping) or not all(isinstance(x, str) for kv in value.items() for x in kv):
        raise UserError(f"{name}: expected a dict of strings, got {type(value).__name__}")
    return dict(value)


def _seconds(value: Any) -> float:
    value = getattr(value, "read", value)  # httpx.Timeout, which the SDKs take
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"timeout: expected a positive number of seconds, got {value!r}")
    return float(value)


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"max_retries: expected an integer of at least 0, got {value!r}")
    return value
