"""What differs for old SDKs."""

from __future__ import annotations

import re

from starlette.requests import Request

from mint_engine.types import CheckpointKind

_EXTERNAL_SINCE = (0, 28)
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})")
_OLD_KINDS: tuple[CheckpointKind, ...] = ("weights", "sampler_weights")
_KINDS: tuple[CheckpointKind, ...] = (*_OLD_KINDS, "external_weights")


def version(request: Request) -> tuple[int, int] | None:
    """Of the tinker SDK that asks; None for any other client."""
    if "tinker" not in request.headers.get("user-agent", "").lower():
        return None
    sent = request.headers.get("x-sdk-version") or request.headers.get("x-stainless-package-version") or ""
    found = _VERSION.match(sent)
    return (int(found[1]), int(found[2])) if found else None


def listed_kinds(request: Request) -> tuple[CheckpointKind, ...]:
    """The kinds of checkpoints to list: SDKs before 0.28 do not know external ones."""
    sdk = version(request)
    return _OLD_KINDS if sdk is not None and sdk < _EXTERNAL_SINCE else _KINDS
