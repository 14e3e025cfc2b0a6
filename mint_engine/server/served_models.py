"""The base models that clients may name."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from mint_engine.errors import UserError
from mint_engine.types import GetServerCapabilitiesResponse

if TYPE_CHECKING:
    from mint_engine.engine import Engine


class ServedModels:
    """``names``: as the server's owner gave them. Without any, whatever the engine has loaded is served."""

    def __init__(self, engine: Engine, names: Sequence[str] = ()) -> None:
        self._engine = engine
        self._names = [_canonical(name) for name in names]

    def load(self) -> list[Future]:
        """Begin to load them all."""
        return [self._engine.load_base(name) for name in self._names]

    @property
    def names(self) -> list[str]:
        return self._names or [base.name for base in self._engine.base_info()]

    def resolve(self, name: str) -> str:
        """The name of the served model that a client means by its name or its directory.

        Raises:
            UserError: it is none of those served; says which are.
        """
        names = self.names
        if name in names:
            return name
        for base in self._engine.base_info():
            if base.name in names and name in (str(base.directory), base.directory.name):
                return base.name
        canonical = _canonical(name)
        if canonical in names:
            return canonical
        raise UserError(f"base_model: this server serves {', '.join(names) or 'no model'}; got {name!r}")

    def capabilities(self) -> GetServerCapabilitiesResponse:
        served = set(self.names)
        models = self._engine.capabilities().supported_models
        return GetServerCapabilitiesResponse(supported_models=[m for m in models if m.model_name in served])


def _canonical(name: str) -> str:
    """A directory by its absolute path, everything else as it is: how the engine names its base models."""
    try:
        path = Path(name).expanduser()
        return str(path.resolve()) if name and path.is_dir() else name
    except (OSError, RuntimeError, ValueError):  # it can be no path: too long, the home of nobody, a null byte
        return name


def is_hub_name(name: str | None) -> bool:
    """Whether it looks like "Qwen/Qwen3-0.6B", which means the same on every machine, and not like a directory."""
    return name is not None and name.count("/") == 1 and not name.startswith(("/", ".", "~"))
