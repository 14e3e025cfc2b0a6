"""``mint-engine serve``: its flags are the fields of the server's Settings."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mint_engine.server.settings import ENV_PREFIX, Settings

_EXTRA_NAMES = {"models": ("--model", "--models")}  # one flag per model reads better


def command() -> Callable[..., None]:
    """The function behind the command, with one option per setting.

    A flag wins over the environment, which wins over the TOML file, which wins over the default. So every flag is None
    until it is given, and the help text says what the default is.
    """

    def serve(config: Path | None = None, **flags: Any) -> None:
        given = {name: value for name, value in flags.items() if value not in (None, [])}
        settings = Settings.load(config, **given)
        from mint_engine.server.serve import run  # imports torch

        sys.exit(run(settings))

    serve.__doc__ = (
        "Serve the engine over HTTP to the tinker and mindlab-toolkit SDKs, `import mint`, and OpenAI clients.\n\n"
        f"Every flag can also be an environment variable ({ENV_PREFIX}PORT and so on) or a line of a TOML file."
    )
    config = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[Path | None, typer.Option(help="A TOML file of settings.", envvar=f"{ENV_PREFIX}CONFIG")],
    )  # fmt: skip
    parameters = [config, *(_option(name) for name in Settings.model_fields)]
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {p.name: p.annotation for p in parameters}
    return serve


def _option(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    kind = _flag_type(field.annotation)
    default = field.get_default(call_default_factory=True)
    shown = "" if default in (None, [], "") else f" [default: {default}]"
    names = list(_EXTRA_NAMES.get(name, ()))
    option = typer.Option(*names, help=f"{field.description}{shown}", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )  # fmt: skip


def _flag_type(annotation: Any) -> Any:
    """What typer parses; Settings checks the value again."""
    text = str(annotation)
    if annotation in (bool, bool | None):
        return bool | None
    if "list" in text:
        return list[str] | None
    for kind in (int, float):
        if annotation is kind or annotation == kind | None:
            return kind | None
    return str | None
