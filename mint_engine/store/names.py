"""What may be a name, an id, a time to live, a page: checked before anything is done."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

from mint_engine.errors import NotFoundError, UserError

MAX_TTL_SECONDS = 100 * 365 * 86400
MAX_ROWS = 2**31
SEARCHED = 100  # newest names that are compared with one that is not there, in some 15 ms

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")


def now() -> datetime:
    return datetime.now(UTC)


def check_name(name: str) -> None:
    """Raises UserError unless `name` can name a checkpoint: one visible file name of at most 200 bytes."""
    if not isinstance(name, str):
        raise UserError(f"name: expected a string, got {type(name).__name__}")
    if not name or len(name.encode("utf-8", "replace")) > 200:
        raise UserError(f"name: expected 1 to 200 bytes, got {len(name.encode('utf-8', 'replace'))}")
    if name.startswith("."):
        raise UserError(f"name: expected no leading dot, got {name!r}")
    if "/" in name or "\\" in name or not name.isprintable():
        raise UserError(f"name: expected no slash, backslash or control character, got {name!r}")


def is_id(identifier: Any) -> bool:
    """Whether it can be the id of something."""
    return isinstance(identifier, str) and _ID.fullmatch(identifier) is not None


def check_id(identifier: str, what: str) -> str:
    """`identifier` itself. Raises NotFoundError for what cannot be the id of anything."""
    if not is_id(identifier):
        raise NotFoundError(f"{what}: expected letters, digits and _ . : -, got {identifier!r}")
    return identifier


def file_name(identifier: str, what: str) -> str:
    """An id as a directory's name."""
    return check_id(identifier, what).replace(":", ".")


def check_text(value: str | None, what: str) -> None:
    """Raises UserError for text a database refuses."""
    if value is not None and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise UserError(f"{what}: expected text without NUL characters and lone surrogates, got {value!r}")


def check_ttl(ttl_seconds: int | None) -> None:
    if ttl_seconds is None:
        return
    number = isinstance(ttl_seconds, int | float) and not isinstance(ttl_seconds, bool)
    if not number or not 0 < ttl_seconds <= MAX_TTL_SECONDS:
        raise UserError(
            f"ttl_seconds: expected None or a positive number of seconds up to {MAX_TTL_SECONDS}, got {ttl_seconds!r}"
        )


def check_page(limit: int, offset: int) -> None:
    if not (0 <= limit < MAX_ROWS and 0 <= offset < MAX_ROWS):
        raise UserError(f"expected limit and offset from 0 to {MAX_ROWS - 1}, got limit={limit}, offset={offset}")


def check_scope(access_scope: Any) -> bool:
    """Whether it says "accessible"."""
    if access_scope not in ("owned", "accessible"):
        raise UserError(f"access_scope: expected 'owned' or 'accessible', got {access_scope!r}")
    return bool(access_scope == "accessible")


class MissingError(NotFoundError):
    """`wanted` is not among `names`; raised inside a transaction. `Database` makes `told()` of it behind the end."""

    def __init__(self, text: str, wanted: str, names: list[str]) -> None:
        super().__init__(text)
        self._wanted, self._names = wanted, names

    def told(self) -> NotFoundError:
        return NotFoundError(f"{self}; {_nearby(self._wanted, self._names)}")


def _nearby(wanted: str, names: list[str]) -> str:
    """The end of a message that `wanted` does not exist: what there is that looks like it."""
    if not names:
        return "there are none here"
    searched = names[:SEARCHED]
    close = get_close_matches(wanted, searched, n=5, cutoff=0.5) or searched[:5]
    left = len(searched) - len(close)
    more = " (and more)" if len(names) > SEARCHED else f" (and {left} more)" if left else ""
    return f"there is: {', '.join(close)}{more}"
