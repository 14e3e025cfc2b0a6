"""The ``mint-engine`` command."""

from __future__ import annotations

import os
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
from mint_engine.errors import MintError, UserError
from mint_engine.store import Store
from mint_engine.types import Checkpoint

app = typer.Typer(help="LoRA post-training as software you own.", no_args_is_help=True, pretty_exceptions_enable=False)
checkpoint = typer.Typer(help="Checkpoints under MINT_HOME (default ~/.mint-engine).", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")

PathArgument = Annotated[str, typer.Argument(help="tinker://<run>/weights/<name> or .../sampler_weights/<name>")]


@app.command()
def demo(
    base_model: Annotated[str, typer.Option(help="A directory, a hub name or smollm2-135m.")] = "smollm2-135m",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 5e-5,
    rank: Annotated[int, typer.Option(min=1, max=256, help="LoRA rank.")] = 16,
    output: Annotated[Path, typer.Option(help="Where the adapter and the loss curve go.")] = Path("demo-output"),
) -> None:
    """Fine-tune a small model on two-digit multiplication and sample from it, before and after."""
    from mint_engine import demo as demo_module  # imports torch: only when it is needed

    demo_module.run(
        base_model, steps=steps, batch_size=batch_size, learning_rate=learning_rate, rank=rank, output=output
    )


@checkpoint.command("list")
def list_checkpoints(
    run: Annotated[str | None, typer.Argument(help="Only those of this training run.")] = None,
) -> None:
    """List checkpoints: path, size, age."""
    store = _store()
    found = store.list_checkpoints(run).checkpoints if run else store.list_user_checkpoints(limit=1000).checkpoints
    if not sys.stdout.isatty():
        for c in found:
            print(c.tinker_path, c.size_bytes, c.time.isoformat(), sep="\t")
        return
    if not found:
        print("no checkpoints")
        return
    Console().print(_table(found))


@checkpoint.command("path")
def checkpoint_path(path: PathArgument) -> None:
    """Print the directory of a checkpoint."""
    print(_store().resolve(path).directory)


@checkpoint.command("export")
def export(
    path: PathArgument, output: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")]
) -> None:
    """Copy a checkpoint's PEFT adapter (adapter_config.json, adapter_model.safetensors) to a directory."""
    source = _store().resolve(path).directory
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


@checkpoint.command("delete")
def delete(path: PathArgument, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Delete a checkpoint for good."""
    store = _store()
    resolved = store.resolve(path)
    if not yes:
        typer.confirm(f"Delete {resolved.tinker_path}?", abort=True)
    store.delete_checkpoint(path)
    print(f"deleted {resolved.tinker_path}")


def _store() -> Store:
    return Store(Path(os.environ.get("MINT_HOME") or Path.home() / ".mint-engine").expanduser())


def _table(checkpoints: list[Checkpoint]) -> Table:
    table = Table()
    table.add_column("path", overflow="fold")  # paths are there to be copied: never cut, never styled
    for name in ("size", "saved", "expires"):
        table.add_column(name, no_wrap=True)
    for c in checkpoints:
        expires = "" if c.expires_at is None else f"{c.expires_at:%Y-%m-%d %H:%M}"
        table.add_row(Text(c.tinker_path), f"{(c.size_bytes or 0) / 1e6:.1f} MB", _age(c.time), expires)
    return table


def _age(when: datetime) -> str:
    seconds = (datetime.now(UTC) - when).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def main() -> None:
    """The console script: errors made for people are printed, not traced."""
    try:
        app()
    except (MintError, OSError) as error:
        typer.secho("error: ", fg="red", err=True, nl=False)
        typer.echo(error, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
