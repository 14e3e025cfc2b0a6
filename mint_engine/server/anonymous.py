"""Who may use a server without a key: programs on this machine, while no keys are configured.

A browser on this machine is not such a program: a page from anywhere could make it send requests to a local port
(cross-site requests), or make a name of its own point here (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

_NO_ADDRESS = ("", "testclient")  # a Unix socket; starlette's TestClient, which is in this very process
_CREATE = "create a key with `mint-engine keys create NAME`, and send it"


def refusal(request: HTTPConnection, *, anywhere: bool = False, known_hosts: Collection[str] = ()) -> str | None:
    """Why a caller without a key is not served, or None.

    anywhere: the owner of the server allows it from other machines, too. known_hosts: names under which this server is
    known to be reachable (of its public URL).
    """
    host = request.headers.get("host", "")
    name = _name(host)
    if not anywhere:
        peer = request.client.host if request.client is not None else ""
        if not _is_local(peer):
            return f"no keys are configured, so only this machine is served: {_CREATE}"
        if "." in name and not name.endswith(".localhost") and not _is_address(name) and name not in known_hosts:
            return f"no keys are configured, so requests to the host {name!r} are not served: {_CREATE}"
    origin = request.headers.get("origin")
    if origin is not None and not _same_site(origin, host, known_hosts):
        return f"no keys are configured, so web pages of {origin!r} are not served: {_CREATE}"
    return None


def _same_site(origin: str, host: str, known_hosts: Collection[str]) -> bool:
    page = origin.partition("://")[2].lower()
    return page == host.lower() or (page != "" and _name(page) in known_hosts)


@lru_cache
def _name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return host


@lru_cache
def _is_local(peer: str) -> bool:
    if peer in _NO_ADDRESS:
        return True
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:  # a reverse proxy that does not say whom it speaks for
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


@lru_cache
def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
