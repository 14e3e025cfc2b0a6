"""The MinT API, on mint-engine: `import mint`.

The engine runs in this process, or on the server that MINT_BASE_URL names (`mint-engine serve`).

    service_client = mint.ServiceClient()
    training_client = service_client.create_lora_training_client(base_model="Qwen/Qwen3-0.6B", rank=16)

Names are those of MinT's and Tinker's Python clients. (PyPI's `mindlab-toolkit`, a client for MinT's servers, has this
import name too: install it in an environment of its own.)
"""

from mint import _api, mint, tinker
from mint._api import *  # noqa: F403
from mint_engine import __version__

__title__ = _api.TITLE
__tinker_version__ = "0.38.0"  # the newest SDK that these names are held to (tests/client/test_surface.py)

__all__ = [*_api.__all__, "__tinker_version__", "__title__", "__version__", "mint", "tinker"]
