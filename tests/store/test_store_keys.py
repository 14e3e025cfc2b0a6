"""API keys: shown once, stored as hashes, revoked for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from store_helpers import Place, move_clock

from mint_engine.errors import NotFoundError, StorageError, UserError
from mint_engine.store import KeyLimits, Store


def test_a_key_is_found_by_its_secret_only(place: Place, store: Store) -> None:
    limits = KeyLimits(max_request_bytes=5, max_disk_bytes=2**40)
    record, secret = store.keys.create("alice", limits=limits)
    other, second = store.keys.create("bob", prefix="sk-")
    assert secret.startswith("tml-")
    assert second.startswith("sk-")
    assert len(secret) >= 47
    found = place.open().keys.find(secret)
    assert (found.key_id, found.name, found.limits) == (record.key_id, "alice", limits)
    assert store.keys.find(second).key_id == other.key_id
    for wrong in ("", "tml-", secret[:-1], secret + "x", secret.upper(), record.key_id, record.prefix):
        assert store.keys.find(wrong) is None


def test_the_secret_is_nowhere_in_the_database(store: Store) -> None:
    record, secret = store.keys.create("alice")
    assert secret.startswith(record.prefix)
    assert len(record.prefix) <= 8
    with store._database.read() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM keys").all()
    assert secret not in str(rows)
    assert secret[8:] not in str(rows)
    assert "alice" in str(rows)


def test_a_revoked_key_is_refused_by_every_process_and_still_listed(place: Place, store: Store) -> None:
    record, secret = store.keys.create("alice")
    store.keys.create("bob")
    place.open().keys.revoke(record.key_id)
    assert store.keys.find(secret) is None
    listed = store.keys.list()
    assert [(key.name, key.revoked is not None) for key in listed] == [("alice", True), ("bob", False)]
    store.keys.revoke(record.key_id)
    assert store.keys.list()[0].revoked == listed[0].revoked, "the first time counts"
    with pytest.raises(NotFoundError, match="key-nobody"):
        store.keys.revoke("key-nobody")


def test_revoking_the_last_key_does_not_open_the_server(store: Store) -> None:
    assert not store.keys.any()
    record, _ = store.keys.create("alice")
    store.keys.revoke(record.key_id)
    assert store.keys.any()


def test_the_last_use_is_noted_to_the_minute(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record, secret = store.keys.create("alice")
    assert record.last_used is None
    store.keys.find(secret)
    first = store.keys.get(record.key_id).last_used
    assert abs(first - datetime.now(UTC)) < timedelta(seconds=10)
    store.keys.find(secret)
    assert store.keys.get(record.key_id).last_used == first
    move_clock(monkeypatch, seconds=100)
    store.keys.find(secret)
    assert store.keys.get(record.key_id).last_used > first


def test_a_full_disk_keeps_nobody_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record, secret = store.keys.create("alice")

    @contextmanager
    def full(action: str) -> Iterator[None]:
        raise StorageError(28, f"{action} failed: the database is full")
        yield

    monkeypatch.setattr(store._database, "write", full)
    assert store.keys.find(secret).key_id == record.key_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "name: expected"),
        ({"name": "a\0"}, "name: expected"),
        ({"name": "a", "prefix": "x-"}, "prefix: expected one of tml-, sk-"),
        ({"name": "a", "limits": KeyLimits(max_disk_bytes=-1)}, "max_disk_bytes: expected"),
    ],
)
def test_bad_arguments_are_named(store: Store, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        store.keys.create(**arguments)
    assert not store.keys.any()
