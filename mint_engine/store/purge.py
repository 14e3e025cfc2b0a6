"""Removing what nobody needs any more: expired checkpoints, old ledger entries, remains of replaced directories."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import Table, delete, select

from mint_engine import durable
from mint_engine.errors import MintError
from mint_engine.store import artifacts, schema
from mint_engine.store.checkpoints import Checkpoints
from mint_engine.store.names import now

log = logging.getLogger(__name__)

LEDGER_DAYS = 30
"""How long the ledger remembers a finished request."""

PARKED_DAYS = 30
"""How long a parked model waits for somebody to come back to it."""


class Purge(Checkpoints):
    def purge_expired(self) -> int:
        """Remove the expired checkpoints of all owners and what is left of replaced ones; say how many expired.

        Also parked models and ledger entries of more than 30 days. A server calls this every few minutes; without one,
        saving a checkpoint does once an hour.
        """
        remains = list(self._versions())  # before the rows are read: a directory made later is not among them
        table, time = schema.checkpoints, now()
        with self._database.write("purging") as connection:
            expired = table.c.expires_at <= time
            gone = connection.execute(select(table.c.id).where(expired)).scalars().all()
            connection.execute(delete(table).where(expired))
            abandoned = schema.parked.c.created < time - timedelta(days=PARKED_DAYS)
            connection.execute(delete(schema.parked).where(abandoned))
            old = schema.ledger.c.finished < time - timedelta(days=LEDGER_DAYS)
            connection.execute(delete(schema.ledger).where(old))
        known = self._known()
        with durable.storage_errors("purging"):
            for directory in remains:
                if directory not in known:
                    artifacts.discard(self.home / directory, unless=partial(self._has_row, directory))
        return len(gone)

    def _versions(self) -> Iterator[str]:
        """Every version's directory below the home, as rows name it."""
        for entry in [*(self.home / "runs").glob("*/*/*"), *(self.home / "parked").glob("*/*")]:
            if artifacts.is_version(entry):
                yield entry.relative_to(self.home).as_posix()

    def _known(self) -> set[str]:
        with self._database.read() as connection:
            return {
                directory
                for table in (schema.checkpoints, schema.parked)
                for directory in connection.execute(select(table.c.directory)).scalars()
            }

    def _has_row(self, directory: str) -> bool:
        def find(table: Table) -> Any:
            return connection.execute(select(table.c.directory).where(table.c.directory == directory)).first()

        with self._database.read() as connection:
            return any(find(table) is not None for table in (schema.checkpoints, schema.parked))

    def _saved(self) -> None:
        """Purge now and then, for those who have no server that does it. A failure is not who saved's."""
        if self._purge_due():
            try:
                self.purge_expired()
            except MintError:
                log.exception("purging expired checkpoints failed")
