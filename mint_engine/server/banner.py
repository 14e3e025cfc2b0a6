"""What a server says of itself when it is ready, and what to paste into a client."""

from __future__ import annotations

import torch

from mint_engine import __version__, kernels
from mint_engine.bases import BaseInfo
from mint_engine.engine import Engine
from mint_engine.server.settings import Settings


def banner(engine: Engine, settings: Settings, url: str, *, keys: bool) -> str:
    """``keys``: whether callers need one."""
    facts = [
        *(("model", _base(base)) for base in engine.base_info()),
        ("compute", f"{engine.dtype} on cpu, {torch.get_num_threads()} threads, instruction set {kernels.isa()}"),
        ("kernels", ", ".join(f"{name}: {faces[0]}" for name, faces in kernels.faces().items())),
        ("home", f"{engine.home} ({engine.store.database_description()})"),
        ("keys", "every caller needs one" if keys else _no_keys(settings)),
    ]
    width = max(len(name) for name, _ in facts)
    tinker_key, mint_key = ("tml-...", "sk-...") if keys else ("tml-local", "sk-local")
    hint = "  # yours, from `mint-engine keys create NAME`" if keys else "  # any key: none is asked for"
    lines = [
        f"mint-engine {__version__} is ready on {url}",
        "",
        *(f"  {name:<{width}}  {value}" for name, value in facts),
        "",
        "Paste into the shell of a client, for `import mint` or mindlab-toolkit:",
        f"  export MINT_BASE_URL={url}",
        f"  export MINT_API_KEY={mint_key}{hint}",
        "or for tinker:",
        f"  export TINKER_BASE_URL={url}",
        f"  export TINKER_API_KEY={tinker_key}{hint}",
        "",
        f"API: {url}/docs   metrics: {url}/metrics   OpenAI clients: {url}/v1   stop: Ctrl-C or SIGTERM",
    ]
    return "\n".join(lines)


def _base(base: BaseInfo) -> str:
    size = base.resident_bytes / 1e6
    return f"{base.name} ({base.architecture}, {base.dtype}, context {base.max_context_length}, {size:.0f} MB)"


def _no_keys(settings: Settings) -> str:
    return "none configured: anybody is served" if settings.allow_anonymous else "none configured: this machine only"
