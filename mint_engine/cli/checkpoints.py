"""``mint-engine checkpoint``: what has been saved."""

from __future__ import annotations

import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mint_engine.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL
from mint_engine.cli.common import DatabaseOption, HomeOption, open_store
from mint_engine.errors import UserError
from mint_engine.types import Checkpoint

app = typer.Typer(help="Checkpoints under MINT_HOME (default ~/.mint-engine).", no_args_is_help=True)

PathArgument = Annotated[str, typer.Argument(help="tinker://<run>/weights/<name> or .../sampler_weights/<name>")]
OwnerOption = Annotated[str, typer.Option(help="A key's id, or local: what was made without a key.")]


@app.command("list")
def list_checkpoints(
    run: Annotated[str | None, typer.Argument(help="Only those of this training run.")] = None,
    owner: OwnerOption = "local",
    home: HomeOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """List checkpoints: path, size, age."""
    store = open_store(home, database_url, owner)
    found = store.list_checkpoints(run).checkpoints if run else store.list_user_checkpoints(limit=1000).checkpoints
    if not sys.stdout.isatty():
        for c in found:
            print(c.tinker_path, c.size_bytes, c.time.isoformat(), sep="\t")
        return
    if not found:
        print("no checkpoints")
        return
    Console().print(_table(found))


@app.command("path")
def checkpoint_path(
    path: PathArgument, owner: OwnerOption = "local", home: HomeOption = None, database_url: DatabaseOption = None
) -> None:
    """Print the directory of a checkpoint."""
    print(open_store(home, database_url, owner).resolve(path).directory)


@app.command("export")
def export(
    path: PathArgument,
    output: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
    owner: OwnerOption = "local",
    home: HomeOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """Copy a checkpoint's PEFT adapter (adapter_config.json, adapter_model.safetensors) to a directory."""
    source = open_store(home, database_url, owner).resolve(path).directory
    if output.exists():
        raise UserError(f"output: {output} exists already")
    try:
        output.mkdir(parents=True)
        for name in (ADAPTER_CONFIG, ADAPTER_MODEL):
            shutil.copyfile(source / name, output / name)
    except OSError:
        shutil.rmtree(output, ignore_errors=True)
        raise
    print(output)


@app.command("delete")
def delete(
    path: PathArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    owner: OwnerOption = "local",
    home: HomeOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """Delete a checkpoint for good."""
    store = open_store(home, database_url, owner)
    resolved = store.resolve(path)
    if not yes:
        typer.confirm(f"Delete {resolved.tinker_path}?", abort=True)
    store.delete_checkpoint(path, at_once=True)
    print(f"deleted {resolved.tinker_path}")


@app.command("publish")
def publish(
    path: PathArgument, owner: OwnerOption = "local", home: HomeOption = None, database_url: DatabaseOption = None
) -> None:
    """Let every key read a checkpoint."""
    open_store(home, database_url, owner).publish(path)
    print(f"published {path}")


@app.command("unpublish")
def unpublish(
    path: PathArgument, owner: OwnerOption = "local", home: HomeOption = None, database_url: DatabaseOption = None
) -> None:
    """Take a published checkpoint back."""
    open_store(home, database_url, owner).unpublish(path)
    print(f"unpublished {path}")


@app.command("set-ttl")
def set_ttl(
    path: PathArgument,
    seconds: Annotated[int | None, typer.Argument(help="Seconds from now; leave out to keep it for good.")] = None,
    owner: OwnerOption = "local",
    home: HomeOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """Let a checkpoint expire."""
    open_store(home, database_url, owner).set_ttl(path, seconds)
    print(f"{path} is kept for good" if seconds is None else f"{path} expires in {seconds} s")


def _table(checkpoints: list[Checkpoint]) -> Table:
    table = Table()
    table.add_column("path", overflow="fold")  # paths are there to be copied: never cut, never styled
    for name in ("size", "saved", "expires"):
        table.add_column(name, no_wrap=True)
    for c in checkpoints:
        expires = "" if c.expires_at is None else f"{c.expires_at:%Y-%m-%d %H:%M}"
        table.add_row(Text(c.tinker_path), f"{(c.size_bytes or 0) / 1e6:.1f} MB", age(c.time), expires)
    return table


def age(when: datetime) -> str:
    seconds = (datetime.now(UTC) - when).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"
