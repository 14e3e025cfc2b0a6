"""Tinker's names, where PyPI's `mindlab-toolkit` has them: `from mint import tinker`, `import mint.tinker as tinker`.

They are those of `mint` itself, so that `mint.tinker.Datum is mint.Datum`.
"""

from mint import _api
from mint._api import *  # noqa: F403
from mint_engine import __version__ as __version__

__title__ = _api.TITLE
__all__ = [*_api.__all__, "__title__", "__version__"]
