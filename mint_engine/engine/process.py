"""The engines of this process: one per dtype, device and home, closed at exit, never used across a fork."""

from __future__ import annotations

import atexit
import os
import threading
from pathlib import Path

import torch

from mint_engine.device import resolve
from mint_engine.engine.engine import Engine, alive
from mint_engine.errors import UserError
from mint_engine.fair_share import DEFAULT_SAMPLING_SHARE

_engines: dict[tuple[str, torch.device, Path], Engine] = {}
_engines_lock = threading.Lock()


def get_engine(dtype: str | None = None, home: Path | None = None, *, device: str | None = None) -> Engine:
    """The process's engine for a compute dtype, a device and a home directory, made on first use.

    Defaults: MINT_DTYPE or "bfloat16"; MINT_DEVICE or "cpu"; MINT_HOME or ``~/.mint-engine``;
    MINT_KV_CACHE_BYTES or a quarter of the machine's memory or its container's limit (touched only as it is used), on
    a GPU of the GPU's;
    MINT_ACTIVATION_BYTES or 2 GiB; MINT_MASKED_LOGPROBS or "true"; MINT_SAMPLING_SHARE or a half;
    MINT_SPECULATION or 0; MINT_WEIGHTS ("int8", "once" or "twice") or what fits, see :class:`Engine`.
    """
    dtype = dtype or os.environ.get("MINT_DTYPE") or "bfloat16"
    home = Path(home or os.environ.get("MINT_HOME") or Path.home() / ".mint-engine").expanduser().resolve()
    key = (dtype, resolve(device), home)
    with _engines_lock:
        if key not in _engines:
            _engines[key] = Engine(
                dtype=dtype, device=str(key[1]), home=home, kv_cache_bytes=_whole("MINT_KV_CACHE_BYTES", "bytes"),
                activation_bytes=_whole("MINT_ACTIVATION_BYTES", "bytes"),
                masked_logprobs=_flag("MINT_MASKED_LOGPROBS", True), sampling_share=_sampling_share(),
                speculation=_whole("MINT_SPECULATION", "tokens"), weights=os.environ.get("MINT_WEIGHTS") or None,
            )  # fmt: skip
        return _engines[key]


def _whole(name: str, what: str) -> int:
    given = os.environ.get(name) or "0"
    if not given.isdecimal():
        raise UserError(f"{name}: expected a number of {what}, got {given!r}")
    return int(given)


def _flag(name: str, default: bool) -> bool:
    given = os.environ.get(name) or str(default)
    if given.lower() not in ("true", "false"):
        raise UserError(f"{name}: expected true or false, got {given!r}")
    return given.lower() == "true"


def _sampling_share() -> float:
    given = os.environ.get("MINT_SAMPLING_SHARE")
    try:
        return float(given) if given else DEFAULT_SAMPLING_SHARE
    except ValueError:
        raise UserError(f"MINT_SAMPLING_SHARE: expected a number between 0 and 1, got {given!r}") from None


def close_engines() -> None:
    """Close every engine :func:`get_engine` made; the next call makes a new one."""
    with _engines_lock:
        engines = list(_engines.values())
        _engines.clear()
    for engine in engines:
        engine.close()


def _drain_all() -> None:
    for engine in list(alive):
        engine.close(drain=True)


def _forget_inherited() -> None:
    """In a forked child the parent's engines have no thread: the child makes its own."""
    global _engines_lock
    _engines_lock = threading.Lock()  # the parent may have held it
    _engines.clear()
    alive.clear()


# What was accepted is done before the process ends: a script may end with save_state() and never read its future.
# (And a thread killed inside a kernel may take the process with it.)
atexit.register(_drain_all)
os.register_at_fork(after_in_child=_forget_inherited)
