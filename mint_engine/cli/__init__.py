"""The ``mint-engine`` command."""

from mint_engine.cli.main import app, main

__all__ = ["app", "main"]
