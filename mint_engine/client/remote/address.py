"""Where a server is and how to talk to it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, TypedDict
from urllib.parse import urlsplit

from httpx import Timeout

from mint_engine.errors import UserError

CONNECT_SECONDS = 5.0

Timeouts = tuple[float | None, float | None, float | None, float | None]
"""Seconds to connect, to wait for an answer, to send, to wait for a free connection; None = no limit."""


class RequestOptions(TypedDict, total=False):
    """The SDK's type for the options of one request. No method of its clients takes them, and none of ours does: what
    holds for every request of a connection is said where it is made, `ServiceClient(timeout=..., max_retries=...)`."""

    headers: Mapping[str, str]
    max_retries: int
    timeout: float | Timeout | None
    params: Mapping[str, object]
    extra_json: Mapping[str, object]
    idempotency_key: str
    follow_redirects: bool


@dataclass(frozen=True)
class Address:
    """One server as one user sees it; connections are shared by equal addresses.

    url: with a scheme, without a trailing slash. timeout: seconds to wait for an answer (not for a result: those are
    waited for as long as they take), or all four `Timeouts`. max_retries: None = as long as it makes sense.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    query: tuple[tuple[str, str], ...] = ()
    timeout: float | Timeouts = 60.0
    max_retries: int | None = None

    @property
    def is_loopback(self) -> bool:
        return _is_loopback(urlsplit(self.url).hostname or "")

    @property
    def timeouts(self) -> Timeout:
        """As httpx takes them. A single number is no reason to wait for a connection for long."""
        if isinstance(self.timeout, tuple):
            return Timeout(self.timeout)
        return Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout))


def address_of(url: str, api_key: str | None = None, options: Mapping[str, Any] | None = None) -> Address:
    """An address from what a user gives: `options` are those of the SDKs' HTTP clients.

    Raises:
        UserError: the URL is none, or an option cannot be honoured.
    """
    checked = check_http_options(options or {})
    key = api_key if api_key is not None else os.environ.get("MINT_API_KEY")
    if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable()):
        raise UserError("api_key: expected printable ASCII characters")
    return Address(
        url=normalize_url(url),
        api_key=key or None,
        **checked,
    )


def check_http_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an address that the SDKs' HTTP options give: timeout (a number, an httpx.Timeout, or None for no
    limit), max_retries, default_headers, default_headers_overrides, default_query; None of these = the default.

    Raises UserError for one that cannot be honoured.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "http_client" in given:
        raise UserError("http_client: expected None: mint-engine makes its own connections")
    headers = {**_strings("default_headers", given), **_strings("default_headers_overrides", given)}
    fields: dict[str, Any] = {
        "headers": tuple(sorted(headers.items())),
        "query": tuple(sorted(_strings("default_query", given).items())),
        "max_retries": _count(given.get("max_retries")),
    }
    if "timeout" in options:
        fields["timeout"] = _timeout(options["timeout"])
    return fields


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


def _timeout(value: Any) -> float | Timeouts:
    if value is None:
        return None, None, None, None
    if isinstance(value, Timeout):
        parts = value.connect, value.read, value.write, value.pool
        connect, read, write, pool = (None if part is None else _seconds(part) for part in parts)
        return connect, read, write, pool
    return _seconds(value)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"timeout: expected a positive number of seconds, got {value!r}")
    return float(value)


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"max_retries: expected an integer of at least 0, got {value!r}")
    return value
