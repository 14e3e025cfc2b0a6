"""Links that let whoever holds them fetch one file for an hour, without a key.

`<public url>/api/v1/downloads/<grant>.<signature>/<file>`: the grant is readable JSON, the signature HMAC-SHA256 over
it. So nothing about a link can be guessed or changed, and nothing needs to be stored. What the grant names is looked up
again, with its owner's eyes, when the link is used.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request

from mint_engine.server.tokens import derive, load_secret

LIFETIME_SECONDS = 3600


class BadLinkError(Exception):
    """A link that was changed or has expired. The text may be shown."""


@dataclass(frozen=True)
class Grant:
    """What a link gives.

    owner: whose eyes see it. what: "file" or "archive" of the checkpoint `name`, or "trace" of the session `name`.
    file: the name under which it is saved. version: of the checkpoint (see `version_of`); a newer one is not served
    under an old link.
    """

    owner: str
    what: str
    name: str
    file: str
    version: str = ""


class Signer:
    """Makes and opens links. `public_url`: of this server as clients reach it, if requests do not tell."""

    def __init__(self, home: Path, *, public_url: str | None = None, lifetime_s: int = LIFETIME_SECONDS) -> None:
        self._key = derive(load_secret(home), "links")
        self._public_url = public_url.rstrip("/") if public_url else None
        self._lifetime = lifetime_s

    def link(self, request: Request, grant: Grant) -> tuple[str, datetime]:
        """The URL and when it expires."""
        expires = int(time.time()) + self._lifetime
        body = json.dumps({**asdict(grant), "expires": expires}, separators=(",", ":"), sort_keys=True).encode()
        token = f"{_encode(body)}.{_encode(self._sign(body))}"
        base = self._public_url or _base_of(request)
        return f"{base}/api/v1/downloads/{token}/{quote(grant.file, safe='')}", datetime.fromtimestamp(expires, UTC)

    def open(self, token: str) -> Grant:
        """What a link grants. Raises BadLinkError."""
        body_text, _, signature_text = token.partition(".")
        try:
            body, signature = _decode(body_text), _decode(signature_text)
        except (ValueError, binascii.Error):
            raise BadLinkError("the link is damaged") from None
        if not hmac.compare_digest(signature, self._sign(body)):
            raise BadLinkError("the link is not one of this server's, or was changed")
        fields = json.loads(body)  # ours, as the signature shows
        if fields.pop("expires") < time.time():
            raise BadLinkError("the link has expired: ask for a new one")
        return Grant(**fields)

    def _sign(self, body: bytes) -> bytes:
        return hmac.new(self._key, body, hashlib.sha256).digest()


def version_of(directory: Path) -> str:
    """Tells the versions of a checkpoint apart: each has a directory of its own."""
    return hashlib.sha256(str(directory).encode()).hexdigest()[:16]


def _base_of(request: Request) -> str:
    # `root_path` is where this application is mounted in another; starlette's base_url leaves it out.
    url = request.url
    return f"{url.scheme}://{url.netloc}{request.scope.get('root_path', '').rstrip('/')}"


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encode(data) != text:
        raise ValueError("not the one way to write these bytes")
    return data
