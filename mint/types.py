"""The types of the API: `from mint import types`."""

from mint_engine.types import *  # noqa: F403
from mint_engine.types import __all__ as __all__
