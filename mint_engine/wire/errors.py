"""What a body that is not what it should be raises, and pydantic's complaints as one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mint_engine.errors import UserError

_SHOWN = 3  # complaints of one request that are worth reading
_LONGEST = 60  # characters of a value that are worth repeating


class WireError(UserError):
    """A request or an answer that cannot be read: broken bytes, a wrong type, sizes that do not agree."""


class BodyTooLargeError(WireError):
    """A body with more bytes than are allowed (HTTP 413)."""


class EncodingError(WireError):
    """A `Content-Encoding` that is not known here (HTTP 415)."""


def show(value: Any) -> str:
    """`repr(value)`, cut to a length that fits in a sentence. Never walks through a large value."""
    if isinstance(value, (list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, (str, bytes)):
        value = value[:_LONGEST]
    elif isinstance(value, int) and value.bit_length() > 200:
        return "a very large integer"
    text = ascii(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def explain(complaints: Sequence[Mapping[str, Any]]) -> str:
    """One readable line for `pydantic.ValidationError.errors()` (FastAPI's RequestValidationError has the same)."""
    lines = [_line(complaint) for complaint in complaints[:_SHOWN]]
    more = len(complaints) - _SHOWN
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def _line(complaint: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in complaint.get("loc", ()) if part != "body")
    prefix = f"{where}: " if where else ""
    message = str(complaint.get("msg", "invalid"))
    if complaint.get("type") == "missing":
        return f"{prefix}is missing"
    if complaint.get("type") == "string_pattern_mismatch":  # there is one pattern, that of names
        message = "expected text without control characters"
    if message.startswith("Value error, "):  # a sentence of ours: it says what came
        message = message.removeprefix("Value error, ")
        return message if where and message.startswith(where.rsplit(".", 1)[-1]) else prefix + message
    return f"{prefix}{message[:1].lower()}{message[1:]}, got {show(complaint.get('input'))}"
