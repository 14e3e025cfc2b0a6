"""The HTTP face of an engine: the protocol of the MinT and Tinker SDKs, and an OpenAI-compatible one for inference.

    app.mount("/", mint_engine.server.create_app(engine))

puts it inside another ASGI application; `mint-engine serve` runs it alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mint_engine.server.app import create_app
    from mint_engine.server.settings import Settings

__all__ = ["Settings", "create_app"]

_HOMES = {"create_app": "mint_engine.server.app", "Settings": "mint_engine.server.settings"}


def __getattr__(name: str) -> Any:
    # The command line reads the settings for its --help: that must not import torch and the engine.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
