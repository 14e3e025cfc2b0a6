"""What a server's refusal raises here: the class that the same mistake raises in process, with the server's words."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

from mint_engine import errors
from mint_engine.errors import MintError, TransportError, UserError

# Classes a server may name in the `type` of a refusal. Nothing else is looked up.
_CLASSES: dict[str, type[MintError]] = {
    kind.__name__: kind
    for kind in (
        errors.CheckpointError,
        errors.EngineClosedError,
        errors.ModelError,
        errors.NonFiniteError,
        errors.NotFoundError,
        errors.SampleCancelledError,
        errors.StorageError,
        errors.UserError,
    )
}

_BY_STATUS: dict[int, type[MintError]] = {
    HTTPStatus.UNAUTHORIZED: errors.AuthenticationError,
    HTTPStatus.PAYMENT_REQUIRED: errors.BillingError,
    HTTPStatus.FORBIDDEN: errors.PermissionDeniedError,
    HTTPStatus.NOT_FOUND: errors.NotFoundError,
}

_SHOWN = 500  # characters of an answer that is not a server's own sentence


class LostPromiseError(MintError):
    """The server does not know a request any more that it had accepted: it has been started anew."""


def refusal(response: httpx.Response) -> MintError:
    """The error of an HTTP answer that is no success."""
    status, body = response.status_code, _json_object(response)
    if status < 400:
        target = response.headers.get("location", "nowhere")
        return TransportError(f"{_where(response)}: the server redirects to {target}: give that address as base_url")
    sentence = _sentence(body.get("detail")) or _unread(response)
    if status >= 500:
        return TransportError(f"{_where(response)}: the server answered {_status(status)}: {sentence}")
    if status == HTTPStatus.UNAUTHORIZED and "X-API-Key" not in response.request.headers:
        sentence += " (set MINT_API_KEY, or pass api_key)"
    if status == HTTPStatus.GONE:
        return LostPromiseError(sentence)
    return _class_of(body, _BY_STATUS.get(status, UserError))(sentence)


def failure(body: Mapping[str, Any]) -> MintError:
    """The error of a request that was accepted and failed: `{"error", "category", "type"?}`."""
    sentence = _sentence(body.get("error")) or "the server gives no reason"
    return _class_of(body, UserError if body.get("category") == "user" else MintError)(sentence)


def unreadable(response: httpx.Response, expected: str) -> TransportError:
    """The error of an answer that makes no sense here."""
    return TransportError(
        f"{_where(response)}: expected {expected}, got {_unread(response)}. Is this a mint-engine server's address?"
    )


def _class_of(body: Mapping[str, Any], default: type[MintError]) -> type[MintError]:
    named = body.get("type")
    return _CLASSES.get(named, default) if isinstance(named, str) else default


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _sentence(detail: Any) -> str:
    """One line of what FastAPI servers put into `detail`: a sentence, or pydantic's list of complaints."""
    if isinstance(detail, list):
        return "; ".join(filter(None, map(_sentence, detail)))
    if isinstance(detail, Mapping):
        where = ".".join(str(part) for part in detail.get("loc", ()) if part != "body")
        message = str(detail.get("msg") or detail.get("message") or dict(detail))
        return f"{where}: {message}" if where else message
    return "" if detail is None else str(detail)


def _unread(response: httpx.Response) -> str:
    kind = response.headers.get("content-type", "no content type")
    if "protobuf" in kind or not response.content:
        return f"{_status(response.status_code)}, {len(response.content)} bytes of {kind}"
    text = response.text.strip()
    return f"{_status(response.status_code)}, {kind}: {text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}"


def _where(response: httpx.Response) -> str:
    return f"{response.request.method} {response.request.url}"


def _status(code: int) -> str:
    try:
        return f"{code} {HTTPStatus(code).phrase}"
    except ValueError:
        return str(code)
