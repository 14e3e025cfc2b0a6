"""The commands and how their errors are shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mint_engine.cli import checkpoints, keys, runs, serve
from mint_engine.cli.common import ConfigOption, DatabaseOption, HomeOption, server_settings
from mint_engine.errors import MintError

app = typer.Typer(help="LoRA post-training as software you own.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(keys.app, name="keys")
app.add_typer(runs.app, name="runs")
app.add_typer(checkpoints.app, name="checkpoint")
app.command("serve")(serve.command())


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


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON document.")] = False,
    home: HomeOption = None,
    database_url: DatabaseOption = None,
    config: ConfigOption = None,
) -> None:
    """Say what this machine can do, which kernels run and why not better ones, and what is missing."""
    from mint_engine import doctor as doctor_module  # imports torch

    settings = server_settings(home, database_url, config)
    report = doctor_module.examine(settings.home_directory, settings.database_url)
    print(report.to_json() if as_json else report.to_text())
    if not report.healthy:
        raise typer.Exit(1)


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
