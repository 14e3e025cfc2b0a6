"""A database, SQLite or PostgreSQL: connections, transactions, and its refusals as StorageError.

Every write is one transaction, on the disk when it returns. SQLite lets one write at a time: within a process writers
queue on a lock, between processes SQLite makes them wait.
"""

from __future__ import annotations

import errno
import os
import threading
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from mint_engine import durable
from mint_engine.errors import StorageError, UserError
from mint_engine.store import schema
from mint_engine.store.names import MissingError

_BUSY_SECONDS = 30
_UPGRADE_LOCK = 0x6D696E74  # any number, the same for every process: "mint"
_VERSION = sqlalchemy.table("alembic_version", sqlalchemy.column("version_num"))

# SQLite's result codes (https://www.sqlite.org/rescode.html); the low byte is the class of the error.
_SQLITE_ERRNO = {5: errno.EBUSY, 6: errno.EBUSY, 8: errno.EROFS, 13: errno.ENOSPC}


class Database:
    """Opened on construction: made if it does not exist, brought up to date if it is old.

    Args:
        url: `sqlite:///<file>` or `postgresql://...`.
        lock: a file that processes lock while they make or upgrade a SQLite database.

    Raises:
        UserError: the URL is not understood, or the database is newer than this code.
        StorageError: it cannot be reached, made or read.
    """

    def __init__(self, url: str, *, lock: Path) -> None:
        self.url = _parse(url)
        self.backend = self.url.get_backend_name()
        self._file_lock = lock
        self._writing = threading.Lock()
        self._engine = _engine(self.url)
        self._writer = self._engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        weakref.finalize(self, self._engine.dispose)
        _alive.add(self)
        self._prepare()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection on which several queries see the same state (SQLite) or committed ones (PostgreSQL)."""
        with _refusals("reading"), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self, action: str) -> Iterator[Connection]:
        """A transaction: committed and on the disk at the end, undone on an exception. Not to be nested.

        `action`: what fails if it fails, as in "creating session x".
        """
        with _refusals(action):
            if self.backend != "sqlite":
                with self._engine.begin() as connection:
                    yield connection
            else:
                with self._writing, self._writer.begin() as connection:
                    yield connection

    def revision(self) -> str | None:
        """The migration the database is at; None if it has no tables yet."""
        with _refusals("opening"), self._engine.connect() as connection:
            return _revision(connection)

    def store_id(self) -> str:
        """Random, made with the tables: tells one database from another."""
        with self.read() as connection:
            return connection.execute(sqlalchemy.select(schema.store.c.store_id)).scalar_one()

    def describe(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Close the connections. The next use opens new ones."""
        self._engine.dispose()

    def after_fork(self) -> None:
        """In a forked child: the parent's connections are the parent's, not even to be closed."""
        self._writing = threading.Lock()
        _inherited.append(self._engine.pool)
        self._engine.dispose(close=False)

    def _prepare(self) -> None:
        # An empty file is not read: that could disturb the process which is just making a database of it.
        empty = self.backend == "sqlite" and not _size(Path(self.url.database or ""))
        if not empty and self.revision() == schema.HEAD:
            return
        with _refusals("opening"):
            if self.backend == "sqlite":
                with durable.locked(self._file_lock):
                    with self._engine.connect() as connection:  # kept in the file, for every later connection
                        connection.connection.driver_connection.execute("PRAGMA journal_mode = WAL")  # type: ignore[union-attr]
                    with self._writer.begin() as connection:
                        _upgrade(connection)
            else:
                with self._engine.begin() as connection:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})")
                    _upgrade(connection)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _upgrade(connection: Connection) -> None:
    """To the newest tables. Whoever held the lock before may have done it already."""
    current = _revision(connection)
    if current == schema.HEAD:
        return
    if current is not None:
        from mint_engine.store import migrate  # imports Alembic

        migrate.upgrade(connection, current)
        return
    schema.metadata.create_all(connection, checkfirst=False)
    connection.execute(schema.store.insert().values(store_id=uuid.uuid4().hex))
    # As Alembic makes it.
    connection.exec_driver_sql(
        "CREATE TABLE alembic_version "
        "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )
    connection.execute(_VERSION.insert().values(version_num=schema.HEAD))


def _revision(connection: Connection) -> str | None:
    if not sqlalchemy.inspect(connection).has_table(_VERSION.name):
        return None
    return connection.execute(sqlalchemy.select(_VERSION.c.version_num)).scalar()


def _parse(url: str) -> sqlalchemy.URL:
    expected = "expected sqlite:///<file> or postgresql://<user>@<host>/<database>"
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError as error:
        raise UserError(f"database_url: {expected}, got something that is no URL") from error
    scheme = parsed.drivername.partition("+")[0]
    if scheme in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if scheme != "sqlite":
        raise UserError(f"database_url: {expected}, got {parsed.drivername}://...")
    if not parsed.database or parsed.database == ":memory:":
        raise UserError(f"database_url: {expected}: a database in memory cannot be shared, got {url!r}")
    return parsed.set(drivername="sqlite")


def _engine(url: sqlalchemy.URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = sqlalchemy.create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, max_overflow=-1)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        # pre_ping: a restarted database costs nobody a request.
        return sqlalchemy.create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
    except ImportError as error:
        raise UserError(f"database_url: needs psycopg: pip install 'psycopg[binary]' ({error})") from error


def _set_up_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # Python's sqlite3 begins no transactions of its own: `_begin_sqlite` does
    connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE waits for its turn at the start. A transaction that began by reading could only fail then.
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


@contextmanager
def _refusals(action: str) -> Iterator[None]:
    """The database's refusals as StorageError. A violated constraint is the caller's to handle, and passes."""
    try:
        yield
    except MissingError as missing:  # looking for what was meant takes time: nobody waits for the transaction meanwhile
        raise missing.told() from None
    except sqlalchemy.exc.IntegrityError:
        raise
    except SQLAlchemyError as error:
        original = error.orig if isinstance(error, DBAPIError) else None
        code = getattr(original, "sqlite_errorcode", 0) & 0xFF
        text = " ".join(str(original or error).split())
        raise StorageError(_SQLITE_ERRNO.get(code, errno.EIO), f"{action} failed: the database says: {text}") from error


_alive: weakref.WeakSet[Database] = weakref.WeakSet()
_inherited: list[Any] = []  # kept, so that the garbage collector does not close what the parent uses


def _forget_inherited() -> None:
    for database in list(_alive):
        database.after_fork()


os.register_at_fork(after_in_child=_forget_inherited)
