"""A home belongs to one database.

Otherwise a store opened with the wrong `database_url` would take all checkpoints for remains and sweep them up.
"""

from __future__ import annotations

from pathlib import Path

from mint_engine import durable
from mint_engine.errors import UserError
from mint_engine.store import files
from mint_engine.store.database import Database


def claim(home: Path, database: Database) -> None:
    """Note on first use that `home` belongs to `database`; raises UserError if it belongs to another one."""
    note, ours = home / "store-id", database.store_id()
    with durable.storage_errors(f"opening {home}"):
        if (theirs := _read(note)) is None:
            with durable.locked(home / ".lock"):
                if (theirs := _read(note)) is None:
                    theirs = ours
                    files.adopt(home, database)
                    with durable.replacing_file(note) as temporary:
                        temporary.write_text(f"{ours}\n")
    if theirs != ours:
        raise UserError(
            f"home: {home} belongs to another database than {database.describe()}. Give the database_url it was used "
            f"with, or another home. If that database is lost: without {note} the home is taken over, and the "
            "checkpoints in it are deleted, for nothing says what they are"
        )


def _read(note: Path) -> str | None:
    try:
        return note.read_text().strip()
    except FileNotFoundError:
        return None
