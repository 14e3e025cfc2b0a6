"""What the commands share: where the store is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mint_engine.store import Store

HomeOption = Annotated[
    Path | None, typer.Option(help="Where everything is kept; default ~/.mint-engine.", envvar="MINT_HOME")
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        help="A PostgreSQL URL, if the server uses one; default SQLite in the home.", envvar="MINT_SERVER_DATABASE_URL"
    ),
]


def open_store(home: Path | None, database_url: str | None, owner: str = "local") -> Store:
    """The store a server started with the same settings uses, as `owner` sees it."""
    directory = (home or Path.home() / ".mint-engine").expanduser()
    return Store(directory, database_url=database_url, owner=owner)
