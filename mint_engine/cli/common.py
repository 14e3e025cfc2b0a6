"""What the commands share: where the store is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mint_engine.server.settings import ENV_PREFIX, Settings
from mint_engine.store import Store

HomeOption = Annotated[
    Path | None,
    typer.Option(help="Where everything is kept; default what a server would take: MINT_SERVER_HOME, the configuration "
                 "file's, MINT_HOME, ~/.mint-engine."),
]  # fmt: skip
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        help="A PostgreSQL URL, if the server uses one; default MINT_SERVER_DATABASE_URL, the configuration file's, "
        "SQLite in the home."
    ),
]
ConfigOption = Annotated[Path | None, typer.Option(help=f"The server's TOML file; default {ENV_PREFIX}CONFIG.")]


def server_settings(home: Path | None, database_url: str | None, config: Path | None) -> Settings:
    """What a server started with the same flags, environment and file would take."""
    if config is None and (named := os.environ.get(f"{ENV_PREFIX}CONFIG")):
        config = Path(named)
    given = {"home": home, "database_url": database_url}
    return Settings.load(config, **{name: value for name, value in given.items() if value is not None})


def open_store(home: Path | None, database_url: str | None, owner: str = "local", config: Path | None = None) -> Store:
    """The store a server started with the same settings uses, as `owner` sees it."""
    settings = server_settings(home, database_url, config)
    return Store(settings.home_directory, database_url=settings.database_url, owner=owner)
