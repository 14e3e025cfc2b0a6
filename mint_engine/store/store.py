"""The store: what was acknowledged is kept.

    <home>/mint.db                                     sessions, runs, checkpoints, keys, ledger (or in PostgreSQL)
    <home>/store-id                                    which database this home belongs to
    <home>/runs/<run>/<kind>/<name>.<random>/          a version of a checkpoint: the files of checkpoint.py
    <home>/parked/<model>/state.<random>/              a model that was put aside
    <home>/archives/                                   tar.gz files and timelines made on request, kept for a day
    <home>/results.json                                what a stopped server has still to say of interpolations

In directory names `:` becomes `.`. Several threads and processes may use one home at the same time.
"""

from __future__ import annotations

from pathlib import Path

from mint_engine import durable
from mint_engine.store.account import Account
from mint_engine.store.base import PURGE_SECONDS, Rarely
from mint_engine.store.claim import claim
from mint_engine.store.copies import Copies
from mint_engine.store.database import Database
from mint_engine.store.keys import KeyStore
from mint_engine.store.ledger import Ledger
from mint_engine.store.parking import Parking
from mint_engine.store.purge import Purge
from mint_engine.store.search import Search


class Store(Search, Account, Copies, Parking, Purge):
    """Sessions, runs, checkpoints, keys and the ledger, as one owner sees them. Made if it does not exist.

    Checkpoints are named `tinker://<run>/<kind>/<name>`; `resolve` says what else is accepted. Methods raise
    NotFoundError for what does not exist or is another owner's, and StorageError when disk or database refuse.

    Raises UserError for a home that belongs to another database.

    Args:
        home: the directory of the artifacts, and of the database unless `database_url` says otherwise. All processes
            that share a database share the home too.
        database_url: `postgresql://...` or `sqlite:///<file>`; default SQLite in the home directory.
        owner: whose things one sees: a key's id, or "local", who needs no key.
    """

    keys: KeyStore

    def __init__(self, home: Path, *, database_url: str | None = None, owner: str = "local") -> None:
        home = Path(home)
        with durable.storage_errors(f"creating {home}"):
            for directory in ("runs", "parked", "archives"):
                durable.make_directory(home / directory)
        url = database_url or f"sqlite:///{home.absolute() / 'mint.db'}"
        database = Database(url, lock=home / ".lock")
        claim(home, database)
        super().__init__(home, database, owner, Rarely(PURGE_SECONDS))
        self.keys, self.ledger = KeyStore(database), Ledger(database)

    def as_owner(self, owner: str) -> Store:
        """The same store as another owner sees it. Cheap: nothing is opened."""
        view = Store.__new__(Store)
        vars(view).update(vars(self))
        view.owner = owner
        return view

    def database_revision(self) -> str:
        """The migration the database is at."""
        return self._database.revision() or "none"

    def database_description(self) -> str:
        """The database's URL without its password."""
        return self._database.describe()

    def close(self) -> None:
        """Close the database's connections, of every owner's view. The next use opens new ones."""
        self._database.close()
