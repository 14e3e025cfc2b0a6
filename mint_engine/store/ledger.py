"""The ledger: one line for each request that was answered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select

from mint_engine.store import schema
from mint_engine.store.database import Database
from mint_engine.store.names import check_page
from mint_engine.store.records import LedgerEntry

_ledger = schema.ledger
_LENGTHS = {"request_id": 200, "model_id": 200, "owner": 64, "kind": 64, "error": 2000}


class Ledger:
    """`store.ledger`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, entries: Iterable[LedgerEntry]) -> None:
        """Write them down, all in one transaction."""
        rows = [_row(entry) for entry in entries]
        if rows:
            with self._database.write("writing the ledger") as connection:
                connection.execute(insert(_ledger), rows)

    def entries(
        self, *, model_id: str | None = None, owner: str | None = None, kinds: Iterable[str] | None = None,
        since: datetime | None = None, until: datetime | None = None, limit: int = 100, offset: int = 0,
    ) -> list[LedgerEntry]:  # fmt: skip
        """Those of a model, of an owner, of some kinds, accepted in some time, of all that is given; newest first."""
        check_page(limit, offset)
        query = select(_ledger).order_by(_ledger.c.id.desc()).limit(limit).offset(offset)
        if model_id is not None:
            query = query.where(_ledger.c.model_id == _text(model_id, "model_id"))
        if owner is not None:
            query = query.where(_ledger.c.owner == _text(owner, "owner"))
        if kinds is not None:
            query = query.where(_ledger.c.kind.in_(list(kinds)))
        if since is not None:
            query = query.where(_ledger.c.accepted >= since)
        if until is not None:
            query = query.where(_ledger.c.accepted <= until)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [LedgerEntry(**{field.name: getattr(row, field.name) for field in fields(LedgerEntry)}) for row in rows]


def _row(entry: LedgerEntry) -> dict[str, Any]:
    """A ledger never refuses: text and numbers are made to fit."""
    row = asdict(entry)
    for name in _LENGTHS:
        if row[name] is not None:
            row[name] = _text(row[name], name)
    for name in ("seq_id", "tokens"):
        if row[name] is not None:
            row[name] = max(-(2**63), min(2**63 - 1, row[name]))
    return row


def _text(value: str, name: str) -> str:
    return value.replace("\0", "").encode("utf-8", "replace").decode()[: _LENGTHS[name]]
