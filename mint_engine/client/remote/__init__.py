"""The same API over HTTP: `RemoteEngine` is an engine on a server."""

from mint_engine.client.remote.address import (
    Address,
    RequestOptions,
    address_of,
    check_http_options,
    normalize_url,
    same_origin,
)
from mint_engine.client.remote.connections import close_connections, connect
from mint_engine.client.remote.engine import RemoteEngine
from mint_engine.client.remote.transport import Patience

__all__ = [
    "Address", "Patience", "RemoteEngine", "RequestOptions", "address_of", "check_http_options", "close_connections",
    "connect", "normalize_url", "same_origin",
]  # fmt: skip
