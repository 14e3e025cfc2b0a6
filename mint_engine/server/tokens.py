"""Short-lived tokens that stand for a key: what `POST auth/token` answers, and the server's one secret.

The tinker SDK exchanges a key for a JWT, reads its claims (`sub`, `org_id`, `email`, `iat`, `exp`) and sends it as
`X-API-Key` from then on. Signature: HMAC-SHA256 over a secret that never leaves the home directory.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import stat
import time
from pathlib import Path

import jwt

from mint_engine import durable

log = logging.getLogger(__name__)

ISSUER = "mint-engine"
LIFETIME_SECONDS = 3600  # tinker 0.22 renews five minutes before the end, 0.38 after half of it
_ALGORITHM = "HS256"
_SECRET_BYTES = 32
_CLOCK_SKEW_SECONDS = 10


class InvalidTokenError(Exception):
    """A token that is not ours, was changed, or has expired. The text may be shown to the caller."""


class Tokens:
    """Issues and checks tokens. `secret`: see `load_secret`."""

    def __init__(self, secret: bytes, lifetime_s: int = LIFETIME_SECONDS) -> None:
        self._key = derive(secret, "tokens")
        self._lifetime = lifetime_s

    def issue(self, subject: str, name: str = "") -> str:
        """A token for the owner `subject`. `name` of the key, for people: the SDK's whoami shows it as the email."""
        now = int(time.time())
        claims = {
            "sub": subject,
            "org_id": ISSUER,
            "email": name,
            "iss": ISSUER,
            "iat": now,
            "exp": now + self._lifetime,
        }
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM)

    def subject(self, token: str) -> str:
        """Whom the token stands for. Raises InvalidTokenError."""
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[_ALGORITHM],  # never what the token's own header asks for
                issuer=ISSUER,
                leeway=_CLOCK_SKEW_SECONDS,
                options={"require": ["sub", "iat", "exp", "iss"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise InvalidTokenError("the token has expired") from error
        except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
            raise InvalidTokenError("the token is not one of this server's") from error
        return str(claims["sub"])


def is_token(credential: str) -> bool:
    """Whether a credential looks like a JWT and not like a key."""
    return credential.startswith("eyJ") and credential.count(".") == 2


def derive(secret: bytes, purpose: str) -> bytes:
    """A key for one purpose, so that nothing signed for one can pass for the other."""
    return hmac.new(secret, purpose.encode(), hashlib.sha256).digest()


def load_secret(home: Path) -> bytes:
    """The server's secret, `<home>/server.secret`: 32 random bytes readable by nobody else, made on first use.

    A file that others can read, or that is damaged, is replaced: tokens and links of before stop working, and clients
    fetch new ones. Safe when several processes start at once.
    """
    path = home / "server.secret"
    with durable.storage_errors(f"reading {path}"):
        durable.make_directory(home)
        with durable.locked(home / ".server.secret.lock"):
            secret = _read(path)
            if secret is None:
                secret = secrets.token_bytes(_SECRET_BYTES)
                with durable.replacing_file(path) as temporary:  # mkstemp's: mode 0600 from its first moment
                    temporary.write_bytes(secret)
            return secret


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            log.warning("%s: others could read it (mode %o); a new secret replaces it", path, mode)
            return None
        secret = file.read(_SECRET_BYTES + 1)
    if len(secret) != _SECRET_BYTES:
        log.warning("%s: expected %d bytes, got %d; a new secret replaces it", path, _SECRET_BYTES, len(secret))
        return None
    return secret
