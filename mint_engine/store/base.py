"""What the parts of a store share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, Row, and_, or_, select
from sqlalchemy.exc import IntegrityError

from mint_engine.errors import NotFoundError, UserError
from mint_engine.store import schema
from mint_engine.store.database import Database
from mint_engine.store.names import SEARCHED, MissingError, check_id, now
from mint_engine.store.records import CheckpointRecord
from mint_engine.types import CheckpointKind

KINDS: tuple[CheckpointKind, ...] = ("weights", "sampler_weights", "external_weights")
PURGE_SECONDS = 3600


class StoreBase:
    """A database and a home directory, as one owner sees them.

    disk_limit: answers the bytes that an owner's checkpoints may take, or None. A server sets it.
    """

    disk_limit: Callable[[str], int | None] | None = None

    def __init__(self, home: Path, database: Database, owner: str, purge_due: Rarely) -> None:
        self.home = home
        self.owner = owner
        self._database = database
        self._purge_due = purge_due

    def _session(self, connection: Connection, session_id: str) -> Row:
        """The row of a session of this owner."""
        check_id(session_id, "session_id")
        table = schema.sessions
        query = select(table).where(table.c.session_id == session_id, table.c.owner == self.owner)
        row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(f"session_id: there is no session {session_id!r}")
        return row

    def _run(self, connection: Connection, run_id: str, *, lock: bool = False) -> Row:
        """The row of a run of this owner. `lock`: nobody else writes to it until the transaction ends."""
        check_id(run_id, "run_id")
        table = schema.runs
        query = select(table).where(table.c.run_id == run_id, table.c.owner == self.owner)
        row = connection.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            known = select(table.c.run_id).where(table.c.owner == self.owner).order_by(table.c.created.desc())
            there = list(connection.execute(known.limit(SEARCHED + 1)).scalars())
            raise MissingError(f"there is no training run {run_id!r}", run_id, there)
        return row

    def _visible(self, accessible: bool) -> ColumnElement[bool]:
        """The checkpoints that have not expired: of this owner, or (`accessible`) published by anybody too."""
        table = schema.checkpoints
        mine = table.c.owner == self.owner
        lasting = or_(table.c.expires_at.is_(None), table.c.expires_at > now())
        return and_(lasting, or_(mine, table.c.public) if accessible else mine)


@contextmanager
def unique(what: str, identifier: str) -> Iterator[None]:
    """Turn a violated constraint into a UserError: the id is taken."""
    try:
        yield
    except IntegrityError as error:
        raise UserError(f"{what}: {identifier!r} already exists") from error


def record_of(row: Row) -> CheckpointRecord:
    return CheckpointRecord.model_validate(dict(row._mapping))


class Rarely:
    """Says yes at first, then at most once in so many seconds; safe to ask from several threads."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._next = 0.0

    def __call__(self) -> bool:
        with self._lock:
            due = time.monotonic() >= self._next
            if due:
                self._next = time.monotonic() + self._seconds
            return due
