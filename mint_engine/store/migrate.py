"""Bring an existing database to the newest tables. Imports Alembic, so it is imported only when that is needed."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from mint_engine.errors import UserError

MIGRATIONS = Path(__file__).parent / "migrations"


def config(connection: Connection | None = None) -> Config:
    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS))
    made.attributes["connection"] = connection
    return made


def upgrade(connection: Connection, current: str) -> None:
    """Run the migrations after `current`, all or none: the caller's transaction holds them.

    Raises:
        UserError: the database is newer than this code.
    """
    known = {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}
    if current not in known:
        raise UserError(
            f"database: it is at revision {current!r}, which this version of mint-engine does not know; "
            "upgrade mint-engine"
        )
    command.upgrade(config(connection), "head")
