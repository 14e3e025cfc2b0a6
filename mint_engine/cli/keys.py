"""``mint-engine keys``: who may use the server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mint_engine.cli.checkpoints import age
from mint_engine.cli.common import ConfigOption, DatabaseOption, HomeOption, open_store
from mint_engine.store import KeyLimits

app = typer.Typer(
    help="API keys. With none the server serves this machine only; with the first one every request needs a key.",
    no_args_is_help=True,
)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose it is; shown in lists.")],
    prefix: Annotated[
        str, typer.Option(help="tml- suits every SDK; sk- is what mindlab-toolkit's documents use.")
    ] = "tml-",
    max_request_bytes: Annotated[int | None, typer.Option(min=1, help="Largest request body.")] = None,
    max_concurrent_requests: Annotated[int | None, typer.Option(min=1, help="Requests at the same time.")] = None,
    max_resident_models: Annotated[int | None, typer.Option(min=1, help="Models in training at once.")] = None,
    max_disk_bytes: Annotated[int | None, typer.Option(min=1, help="Checkpoints, all together.")] = None,
    home: HomeOption = None,
    database_url: DatabaseOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a key and print it. It is stored as a hash: this is the only time it can be read."""
    limits = KeyLimits(
        max_request_bytes=max_request_bytes,
        max_concurrent_requests=max_concurrent_requests,
        max_resident_models=max_resident_models,
        max_disk_bytes=max_disk_bytes,
    )
    record, secret = open_store(home, database_url, config=config).keys.create(name, prefix=prefix, limits=limits)
    typer.echo(f"key {record.key_id} for {name}; it is shown once:", err=True)
    print(secret)


@app.command("list")
def list_keys(home: HomeOption = None, database_url: DatabaseOption = None, config: ConfigOption = None) -> None:
    """List keys: id, name, how they begin, when they were made, last used, revoked."""
    keys = open_store(home, database_url, config=config).keys.list()
    if not sys.stdout.isatty():
        for key in keys:
            state = "revoked" if key.revoked else "active"
            print(key.key_id, key.name, key.prefix, key.created.isoformat(), state, sep="\t")
        return
    table = Table("id", "name", "begins with", "made", "last used", "state")
    for key in keys:
        used = "never" if key.last_used is None else age(key.last_used)
        state = "revoked" if key.revoked else "active"
        table.add_row(key.key_id, key.name, key.prefix, age(key.created), used, state)
    Console().print(table if keys else "no keys: the server serves this machine only")


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `keys list` shows it.")],
    home: HomeOption = None,
    database_url: DatabaseOption = None,
    config: ConfigOption = None,
) -> None:
    """Refuse a key from now on. What was made with it stays."""
    open_store(home, database_url, config=config).keys.revoke(key_id)
    print(f"revoked {key_id}")
