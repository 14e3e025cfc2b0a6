"""``mint-engine runs``: training runs, those used last first."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mint_engine.cli.checkpoints import OwnerOption, age
from mint_engine.cli.common import DatabaseOption, HomeOption, open_store

app = typer.Typer(help="Training runs under MINT_HOME.", no_args_is_help=True)


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(min=1, help="So many at most.")] = 20,
    owner: OwnerOption = "local",
    home: HomeOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """List runs: id, base model, rank, last used."""
    runs = open_store(home, database_url, owner).list_runs(limit=limit).training_runs
    if not sys.stdout.isatty():
        for run in runs:
            print(run.training_run_id, run.base_model, run.lora_rank, run.last_request_time.isoformat(), sep="\t")
        return
    table = Table()
    table.add_column("run", overflow="fold")
    for name in ("base model", "rank", "last used"):
        table.add_column(name)
    for run in runs:
        table.add_row(Text(run.training_run_id), run.base_model, str(run.lora_rank), age(run.last_request_time))
    Console().print(table if runs else "no runs")


@app.command("info")
def info(
    run_id: Annotated[str, typer.Argument(help="As `runs list` shows it.")],
    owner: OwnerOption = "local",
    home: HomeOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """Print what is known about a run, as JSON."""
    print(open_store(home, database_url, owner).get_run(run_id).model_dump_json(indent=2))
