"""The one object that owns a device: give it work, get futures. ``process`` keeps one for the whole process."""

from mint_engine.engine.engine import Engine
from mint_engine.engine.process import close_engines, get_engine

__all__ = ["Engine", "close_engines", "get_engine"]
