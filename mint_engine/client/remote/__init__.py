"""The same API over HTTP: `RemoteEngine` is an engine on a server."""

from mint_engine.client.remote.address import Address, address_of, normalize_url, same_origin
from mint_engine.client.remote.connections import close_connections, connect
from mint_engine.client.remote.engine import RemoteEngine
from mint_engine.client.remote.transport import Patience

__all__ = [
    "Address", "Patience", "RemoteEngine", "address_of", "close_connections", "connect", "normalize_url", "same_origin",
]  # fmt: skip
