"""One connection to each server in a process, shared by its clients and closed when the process ends."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading

from mint_engine.client.remote.address import Address
from mint_engine.client.remote.background import stop_background
from mint_engine.client.remote.engine import RemoteEngine
from mint_engine.errors import MintError
from mint_engine.types import FinishReason

log = logging.getLogger("mint_engine.client")

_lock = threading.Lock()
_engines: dict[Address, RemoteEngine] = {}
_inherited: list[RemoteEngine] = []


def connect(address: Address) -> RemoteEngine:
    """The process's connection to a server, made on first use. Nothing is sent yet."""
    with _lock:
        if address not in _engines:
            _engines[address] = RemoteEngine(address)
        return _engines[address]


def close_connections(status: FinishReason = "success") -> None:
    """Send what has been called, finish the sessions and hang up. The next `connect` makes a new connection."""
    with _lock:
        engines = list(_engines.values())
        _engines.clear()
    for engine in engines:
        try:
            engine.close(drain=True, status=status)
        except MintError as error:
            log.warning("%s: %s", engine.address.url, error)
    stop_background()


def _at_exit() -> None:
    # The interpreter keeps here what ended the program, if it was an exception.
    ended_by = getattr(sys, "last_value", None)
    if ended_by is None:
        close_connections("success")
    else:
        close_connections("interrupted" if isinstance(ended_by, KeyboardInterrupt) else "errored")


def _forget_inherited() -> None:
    """A forked child makes its own connections; the parent's sockets are not to be touched."""
    global _lock
    _lock = threading.Lock()  # the parent may have held it
    _inherited.extend(_engines.values())
    _engines.clear()


# What was called is sent before the process ends: a script may end with save_state() and never read its future.
atexit.register(_at_exit)
os.register_at_fork(after_in_child=_forget_inherited)
