"""API keys. A secret is shown once and stored as a hash only."""

from __future__ import annotations

import builtins
import hashlib
import hmac
import secrets
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

from sqlalchemy import Row, insert, select, update

from mint_engine.errors import NotFoundError, StorageError, UserError
from mint_engine.store import schema
from mint_engine.store.database import Database
from mint_engine.store.names import check_id, check_text, now
from mint_engine.store.records import KeyLimits, KeyRecord

PREFIXES = ("tml-", "sk-")

_keys = schema.keys
_SHOWN = 8  # characters of the secret: enough to tell keys apart, useless to guess by
_USED_EVERY = timedelta(minutes=1)  # a write per request would be too many


class KeyStore:
    """`store.keys`. A key's id owns everything that is made with it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, *, prefix: str = "tml-", limits: KeyLimits | None = None) -> tuple[KeyRecord, str]:
        """A new key and its secret, which nobody can read again."""
        if not isinstance(name, str) or not 0 < len(name) <= 200:
            raise UserError(f"name: expected 1 to 200 characters, got {name!r}")
        check_text(name, "name")
        if prefix not in PREFIXES:
            raise UserError(f"prefix: expected one of {', '.join(PREFIXES)}, got {prefix!r}")
        limits = limits or KeyLimits()
        for limit, value in asdict(limits).items():
            if value is not None and not 0 <= value < 2**63:
                raise UserError(f"{limit}: expected a number from 0, got {value}")
        secret = prefix + secrets.token_urlsafe(32)
        record = KeyRecord(f"key-{secrets.token_hex(8)}", name, secret[:_SHOWN], now(), limits=limits)
        with self._database.write(f"creating key {name!r}") as connection:
            connection.execute(
                insert(_keys).values(
                    key_id=record.key_id,
                    name=name,
                    prefix=record.prefix,
                    secret_hash=_hash(secret),
                    created=record.created,
                    **asdict(limits),
                )
            )
        return record, secret

    def list(self) -> builtins.list[KeyRecord]:
        """All keys, revoked ones too, oldest first."""
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(select(_keys).order_by(_keys.c.created, _keys.c.key_id))]

    def revoke(self, key_id: str) -> None:
        """Refuse a key from now on. What was made with it stays."""
        check_id(key_id, "key_id")
        with self._database.write(f"revoking {key_id}") as connection:
            row = connection.execute(select(_keys).where(_keys.c.key_id == key_id)).one_or_none()
            if row is None:
                raise NotFoundError(f"key_id: there is no key {key_id!r}")
            if row.revoked is None:
                connection.execute(update(_keys).where(_keys.c.key_id == key_id).values(revoked=now()))

    def find(self, secret: str) -> KeyRecord | None:
        """The key with this secret; None if there is none, or it was revoked.

        The secret is looked up by its hash, so how long that takes says nothing about the secrets there are.
        """
        digest = _hash(secret)
        with self._database.read() as connection:
            row = connection.execute(select(_keys).where(_keys.c.secret_hash == digest)).one_or_none()
        if row is None or not hmac.compare_digest(row.secret_hash, digest) or row.revoked is not None:
            return None
        record = _record(row)
        if record.last_used is None or now() - record.last_used > _USED_EVERY:
            # A full disk keeps nobody out.
            with suppress(StorageError), self._database.write("noting that a key was used") as connection:
                connection.execute(update(_keys).where(_keys.c.key_id == record.key_id).values(last_used=now()))
        return record

    def get(self, key_id: str) -> KeyRecord:
        """Raises NotFoundError."""
        check_id(key_id, "key_id")
        with self._database.read() as connection:
            row = connection.execute(select(_keys).where(_keys.c.key_id == key_id)).one_or_none()
        if row is None:
            raise NotFoundError(f"key_id: there is no key {key_id!r}")
        return _record(row)

    def any(self) -> bool:
        """Whether keys were ever made. Revoked ones count: revoking the last one must not open the server to all."""
        with self._database.read() as connection:
            return connection.execute(select(_keys.c.key_id).limit(1)).first() is not None


def _hash(secret: str) -> str:
    # 256 random bits need no salt and no slow hash: there is no dictionary to try.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _record(row: Row) -> KeyRecord:
    limits = KeyLimits(row.max_request_bytes, row.max_concurrent_requests, row.max_resident_models, row.max_disk_bytes)
    return KeyRecord(row.key_id, row.name, row.prefix, row.created, row.revoked, row.last_used, limits)
