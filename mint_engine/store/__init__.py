"""What is kept: sessions, runs, checkpoints, keys, the ledger. `Store` is the way in."""

from mint_engine.store.archive import ARCHIVE_SECONDS
from mint_engine.store.artifacts import GRACE_SECONDS
from mint_engine.store.keys import KeyStore
from mint_engine.store.ledger import Ledger
from mint_engine.store.names import check_name
from mint_engine.store.records import (
    SCOPE,
    CheckpointRecord,
    KeyLimits,
    KeyRecord,
    LedgerEntry,
    Parked,
    ResolvedCheckpoint,
)
from mint_engine.store.store import Store

__all__ = [
    "ARCHIVE_SECONDS",
    "GRACE_SECONDS",
    "SCOPE",
    "CheckpointRecord",
    "KeyLimits",
    "KeyRecord",
    "KeyStore",
    "Ledger",
    "LedgerEntry",
    "Parked",
    "ResolvedCheckpoint",
    "Store",
    "check_name",
]
