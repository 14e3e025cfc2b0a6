"""The ledger remembers requests, and refuses none."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from store_helpers import Place, move_clock

from mint_engine.store import LedgerEntry, Store


def entry(i: int, **more: object) -> LedgerEntry:
    accepted = datetime.now(UTC)
    given = {
        "owner": "local",
        "kind": "OptimStep",
        "status": "done",
        "finished": accepted,
        "model_id": "m",
        "seq_id": i,
    }
    return LedgerEntry(request_id=f"r-{i}", accepted=accepted, **{**given, **more})


def test_entries_come_back_as_they_were_newest_first(place: Place, store: Store) -> None:
    first = [entry(1, tokens=7), entry(2, status="failed", error="no: not finite", seq_id=None)]
    store.ledger.append(first)
    store.ledger.append([])
    store.ledger.append([entry(3, owner="key-2", model_id=None)])
    again = place.open().ledger
    assert again.entries(model_id="m") == first[::-1]
    assert [e.request_id for e in again.entries()] == ["r-3", "r-2", "r-1"]
    assert [e.request_id for e in again.entries(owner="key-2")] == ["r-3"]
    assert again.entries(owner="key-2", model_id="m") == []
    assert [e.request_id for e in again.entries(limit=1, offset=1)] == ["r-2"]


def test_entries_of_some_kinds_and_of_a_time(store: Store) -> None:
    now = datetime.now(UTC)
    entries = [entry(i, kind=kind) for i, kind in enumerate(("OptimStep", "SaveWeights", "LoadWeights", "SaveWeights"))]
    store.ledger.append(replace(e, accepted=now + timedelta(hours=i)) for i, e in enumerate(entries))
    found = store.ledger.entries(kinds=["SaveWeights", "LoadWeights"], since=now, until=now + timedelta(hours=2))
    assert [e.request_id for e in found] == ["r-2", "r-1"]
    assert store.ledger.entries(kinds=[]) == []


def test_whatever_a_request_held_is_written_down(store: Store) -> None:
    store.ledger.append([entry(10**30, error="\0\ud800" + "x" * 10**5, model_id="m\0" * 500, kind="é" * 100)])
    (found,) = store.ledger.entries()
    assert (found.seq_id, found.error[:3], len(found.error)) == (2**63 - 1, "?xx", 2000)
    assert store.ledger.entries(model_id="m\0" * 500) == [found]


def test_many_entries_are_one_write(store: Store) -> None:
    store.ledger.append([entry(i) for i in range(1000)])
    assert [e.seq_id for e in store.ledger.entries(limit=3)] == [999, 998, 997]


def test_the_ledger_forgets_after_a_month(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.ledger.append([entry(1), entry(2, finished=datetime.now(UTC) + timedelta(days=5))])
    move_clock(monkeypatch, days=31)
    store.purge_expired()
    assert [e.request_id for e in store.ledger.entries()] == ["r-2"]
